"""Any result as the command line shows it: tables for people, or the document of --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from quantkit.evaluate.check_verdict import Verdict
    from quantkit.evaluate.document import Evaluation
    from quantkit.pipeline.events import Report
    from quantkit.pipeline.forecast import Forecast
    from quantkit.pipeline.inspection import Inspection
    from quantkit.pipeline.inspection_gguf import GgufInspection
    from quantkit.pipeline.inspection_imatrix import ImatrixInspection


def text(
    result: Report | Forecast | Evaluation | Inspection | GgufInspection | ImatrixInspection | Sequence[Verdict],
) -> str:
    """What a command prints of its result: aligned tables in plain text."""
    from quantkit.evaluate.document import Evaluation
    from quantkit.library.converted_text import report_text
    from quantkit.library.evaluation_text import evaluation_text
    from quantkit.library.forecast_text import forecast_text
    from quantkit.library.inspection_text import inspection_text
    from quantkit.library.verdict_text import verdicts_text
    from quantkit.pipeline.events import Report
    from quantkit.pipeline.forecast import Forecast
    from quantkit.pipeline.inspection import Inspection
    from quantkit.pipeline.inspection_gguf import GgufInspection
    from quantkit.pipeline.inspection_imatrix import ImatrixInspection

    match result:
        case Report():
            return report_text(result)
        case Forecast():
            return forecast_text(result)
        case Evaluation():
            return evaluation_text(result)
        case Inspection() | GgufInspection() | ImatrixInspection():
            return inspection_text(result)
        case _:
            return verdicts_text(result)


def document(
    result: Report | Forecast | Evaluation | Inspection | GgufInspection | ImatrixInspection,
) -> Mapping[str, object]:
    """Plain values that JSON can say, as ``--json`` prints them: sizes in bytes, times in seconds, divergences in nats;
    null for what is no number."""
    from quantkit.evaluate.document import Evaluation
    from quantkit.library.converted_text import report_document
    from quantkit.library.forecast_text import forecast_document
    from quantkit.library.inspection_text import inspection_document
    from quantkit.pipeline.events import Report
    from quantkit.pipeline.forecast import Forecast
    from quantkit.pipeline.json_text import finite

    match result:
        case Report():
            found = report_document(result)
        case Forecast():
            found = forecast_document(result, result.plan.recipe.description)
        case Evaluation():
            found = result.document()
        case _:
            found = inspection_document(result)
    return cast("Mapping[str, object]", finite(found))
