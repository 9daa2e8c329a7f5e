"""Any result as the command line shows it: tables for people, or the document of --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from quantkit.convert.events import Report
    from quantkit.documents.calibration_set import CalibrationSet
    from quantkit.documents.evaluation import Evaluation
    from quantkit.documents.sensitivity import SensitivityDocument
    from quantkit.evaluate.check.verdict import Verdict
    from quantkit.inspect.folder import Inspection
    from quantkit.inspect.gguf import GgufInspection
    from quantkit.inspect.imatrix import ImatrixInspection
    from quantkit.inspect.trial import TrialInspection
    from quantkit.plan.forecast import Forecast


def text(
    result: Report
    | Forecast
    | Evaluation
    | Inspection
    | GgufInspection
    | ImatrixInspection
    | TrialInspection
    | CalibrationSet
    | SensitivityDocument
    | Sequence[Verdict],
) -> str:
    """What a command prints of its result: aligned tables in plain text."""
    from quantkit.convert.events import Report
    from quantkit.documents.calibration_set import CalibrationSet
    from quantkit.documents.evaluation import Evaluation
    from quantkit.documents.sensitivity import SensitivityDocument
    from quantkit.inspect.folder import Inspection
    from quantkit.inspect.gguf import GgufInspection
    from quantkit.inspect.imatrix import ImatrixInspection
    from quantkit.inspect.trial import TrialInspection
    from quantkit.plan.forecast import Forecast
    from quantkit.text.calibration_set import calibration_set_text
    from quantkit.text.converted import report_text
    from quantkit.text.evaluation import evaluation_text
    from quantkit.text.forecast import forecast_text
    from quantkit.text.inspection import inspection_text
    from quantkit.text.sensitivity import sensitivity_text
    from quantkit.text.verdict import verdicts_text

    match result:
        case Report():
            return report_text(result)
        case Forecast():
            return forecast_text(result)
        case Evaluation():
            return evaluation_text(result)
        case CalibrationSet():
            return calibration_set_text(result)
        case SensitivityDocument():
            return sensitivity_text(result)
        case Inspection() | GgufInspection() | ImatrixInspection() | TrialInspection():
            return inspection_text(result)
        case _:
            return verdicts_text(result)


def document(
    result: Report
    | Forecast
    | Evaluation
    | Inspection
    | GgufInspection
    | ImatrixInspection
    | TrialInspection
    | CalibrationSet
    | SensitivityDocument,
) -> Mapping[str, object]:
    """Plain values that JSON can say, as ``--json`` prints them: sizes in bytes, times in seconds, divergences in nats;
    null for what is no number."""
    from quantkit.convert.events import Report
    from quantkit.documents.calibration_set import CalibrationSet
    from quantkit.documents.evaluation import Evaluation
    from quantkit.documents.json_text import finite
    from quantkit.documents.sensitivity import SensitivityDocument
    from quantkit.plan.forecast import Forecast
    from quantkit.text.converted import report_document
    from quantkit.text.forecast import forecast_document
    from quantkit.text.inspection import inspection_document

    match result:
        case Report():
            found = report_document(result)
        case Forecast():
            found = forecast_document(result, result.plan.recipe.description)
        case Evaluation():
            found = result.document()
        case CalibrationSet() | SensitivityDocument():
            found = result.model_dump(mode="json")
        case _:
            found = inspection_document(result)
    return cast("Mapping[str, object]", finite(found))
