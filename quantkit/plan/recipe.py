"""A recipe: what is quantised how, with which text, into which outputs, and how good the result must be.

Everything here is data: frozen models that refuse unknown keys and contradictions. `quantkit.plan.recipe_file`
reads such models from YAML; `quantkit.plan.plan` joins them with a checkpoint.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field, PrivateAttr, StringConstraints, field_validator, model_validator
from pydantic.config import JsonDict, JsonValue

from quantkit.calibrate.dataset import Calibration
from quantkit.plan.output_target import OutputTarget
from quantkit.plan.recipe_file import model_of, read_model, recipe_path, shipped_recipes
from quantkit.plan.recipe_prune import Prune
from quantkit.plan.recipe_validation import Validation
from quantkit.plan.recipe_values import checked_size, fault, one_of, parse_size
from quantkit.plan.tune import AskedTune
from quantkit.quantizers import AskedMethod
from quantkit.runtimes.llama_cpp.presets import FILE_TYPES
from quantkit.schemes import ChosenScheme
from quantkit.schemes.ggml.types import BLOCK_TYPES
from quantkit.tensors import Role, TensorSpec

Keep = Literal["source", "bf16", "f16", "f32"]
"""source: as the checkpoint stores it (an FP8 block weight keeps its FP8 bytes, a packed one its codes and scales);
bf16, f16, f32: converted, decoded if it was FP8 or packed."""


def _with_type_names(schema: JsonDict) -> None:
    """Tell editors that a scheme may be the name of a block type."""
    cast("list[JsonValue]", schema["anyOf"]).insert(0, {"enum": list(BLOCK_TYPES)})


class Rule(BaseModel, frozen=True, extra="forbid"):
    """What happens to the tensors that ``match`` names. Of all rules of an output the first that matches a tensor
    decides.

    Exactly one of ``keep``, ``drop``, or ``scheme``, the last with or without a ``method`` of its own.
    """

    match: Annotated[str, StringConstraints(min_length=1, max_length=500)] = Field(
        description='"role:expert|shared_expert", or a glob on the tensor name, "*.experts.*.down_proj.weight". '
        "With a scheme, a role stands for its linears only; other tensors of the role go on to the next rule."
    )
    keep: Keep | None = Field(
        None, description="Store unquantised: as the source does, or converted to bf16, f16 or f32."
    )
    drop: Literal[True] | None = Field(None, description="Leave the tensors out. Only MTP tensors can be dropped.")
    scheme: ChosenScheme | None = Field(
        None,
        description="What the stored numbers mean. The name of a block type of ggml, such as Q4_K, stands for "
        "{kind: ggml, type: Q4_K}.",
        json_schema_extra=_with_type_names,
    )
    method: AskedMethod | None = Field(None, description="How the codes are chosen; null: the output's method.")

    @field_validator("match")
    @classmethod
    def _roles_exist(cls, match: str) -> str:
        if match.startswith("role:"):
            for name in match.removeprefix("role:").split("|"):
                if name not in _ROLES:
                    raise fault(f"found role {name[:40]!r}, needed {one_of(name, _ROLES)}")
        elif "|" in match:
            raise fault(f"found {match[:60]!r}, needed role:a|b or one glob ('|' joins roles, not globs)")
        return match

    @field_validator("scheme", mode="before")
    @classmethod
    def _type_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in BLOCK_TYPES:
            raise fault(f"found {value[:40]!r}, needed a mapping, or {one_of(value, tuple(BLOCK_TYPES))}")
        return {"kind": "ggml", "type": value}

    @model_validator(mode="after")
    def _one_action(self) -> Rule:
        given = [key for key in ("keep", "drop", "scheme", "method") if getattr(self, key) is not None]
        if given not in (["keep"], ["drop"], ["scheme"], ["scheme", "method"]):
            found = " and ".join(given) or "no action"
            raise fault(f"found {found}, needed exactly one of: keep, drop, or scheme (with or without method)")
        return self

    @property
    def roles(self) -> frozenset[Role] | None:
        """The roles of a ``role:`` rule, None for a glob."""
        if not self.match.startswith("role:"):
            return None
        return frozenset(Role(name) for name in self.match.removeprefix("role:").split("|"))

    def matcher(self) -> Callable[[TensorSpec], bool]:
        """A test for tensors. Compiled once, because a plan asks it for each of V3's 46,000 tensors."""
        roles = self.roles
        if roles is None:
            # The official name of a linear stands for its parts, too: rules move between outputs of different formats.
            pattern = re.compile(fnmatch.translate(self.match))
            return lambda t: any(pattern.match(name) for name in ((t.name, t.part_of) if t.part_of else (t.name,)))
        if self.scheme is not None:
            tables = self.scheme.fits_tables
            return lambda tensor: tensor.role in roles and (tensor.linear or (tables and tensor.table))
        return lambda tensor: tensor.role in roles


Rules = Annotated[tuple[Rule, ...], Field(max_length=1000)]


CurvePoint = tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""Bytes of tensor data, and the mean KL divergence that is expected there."""


class _Output(BaseModel, frozen=True, extra="forbid"):
    """One checkpoint to be written."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = Field(
        description="Names the output in reports, and its folder when the recipe has several outputs."
    )
    method: AskedMethod | None = Field(
        None,
        description="How the codes are chosen where a rule does not say; null: gptq with calibration text, else rtn. "
        "Tensors that no calibration input reaches take rtn.",
    )
    target: OutputTarget | None = Field(
        None,
        description="How large the output may be: the type of each linear that no rule matches is chosen so that the "
        "predicted loss is least. Needs calibration and sensitivity.",
    )
    predicted_kl: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="What the choice of types expects of the mean KL divergence, for reports; written by "
        "--print-recipe, changes no byte.",
    )
    predicted_curve: Annotated[tuple[CurvePoint, ...], Field(max_length=100)] = Field(
        (),
        description="The same of other sizes of that choice: bytes of tensor data, expected mean KL divergence.",
    )

    @property
    def keeps_mtp(self) -> bool:
        """Whether MTP layers are stored where no rule says so."""
        return False


class FolderOutput(_Output, frozen=True, extra="forbid"):
    """A folder of safetensors that vLLM and transformers load."""

    format: Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes"] = Field(
        description="Which bytes hold the result: compressed-tensors for integers, NVFP4, MXFP4 and FP8; gptq (as "
        "AutoGPTQ wrote it), gptq_v2 (zero points as they are) and awq for integers; bitsandbytes for NF4 and FP4."
    )
    rules: Rules = Field(
        (), description="First match wins; without a target they must match every tensor of the checkpoint."
    )
    max_shard_size: str = Field(
        "5GB", description="Largest shard file, as a number with unit (GB is decimal, GiB binary)."
    )

    @field_validator("max_shard_size")
    @classmethod
    def _is_size(cls, text: str) -> str:
        return checked_size(text)

    @model_validator(mode="after")
    def _says_what(self) -> FolderOutput:
        if not self.rules and self.target is None:
            raise fault("found neither rules nor target, needed one of them, or both")
        if self.target is not None and self.format != "compressed-tensors":
            raise fault(f"found target with format {self.format}, needed compressed-tensors or gguf")
        return self

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        return parse_size(self.max_shard_size)


class GgufOutput(_Output, frozen=True, extra="forbid"):
    """A GGUF file that llama.cpp loads, whole or in splits, and the importance of its inputs beside it."""

    format: Literal["gguf"] = Field(description="Which bytes hold the result.")
    preset: str | None = Field(
        None,
        description="A mix of block types by the name that llama-quantize gives it, for what no rule matches.",
        json_schema_extra={"anyOf": [{"enum": list(FILE_TYPES)}, {"type": "null"}]},
    )
    rules: Rules = Field((), description="First match wins; without a preset they must match every tensor.")
    mtp: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: leave the MTP layer out; keep: rules and preset say how it is stored, "
        "or, beside a target, 8 bits.",
    )
    split_max_size: str | None = Field(
        None, description="Largest file, as a number with unit (GB is decimal, GiB binary); null: one file."
    )
    pre: str | None = Field(
        None, max_length=80, description="llama.cpp's name of the pre-tokenizer; null: recognised by tokenizer.json."
    )
    imatrix: bool = Field(True, description="With calibration text: write imatrix.gguf beside the model.")

    @field_validator("preset")
    @classmethod
    def _preset_exists(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in FILE_TYPES:
            raise fault(f"found {preset[:40]!r}, needed {one_of(preset, tuple(FILE_TYPES))}")
        return preset

    @field_validator("split_max_size")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        return None if text is None else checked_size(text)

    @model_validator(mode="after")
    def _says_what(self) -> GgufOutput:
        if self.preset is not None and self.target is not None:
            raise fault("found preset and target, needed one of them (rules may stand beside a target)")
        if self.preset is None and self.target is None and not self.rules:
            raise fault("found neither preset, rules nor target, needed one of them")
        return self

    @property
    def keeps_mtp(self) -> bool:
        """Whether MTP layers are stored where no rule says so."""
        return self.mtp == "keep"

    @property
    def max_shard_bytes(self) -> int | None:
        """``split_max_size`` in bytes."""
        return None if self.split_max_size is None else parse_size(self.split_max_size)


Output = Annotated[FolderOutput | GgufOutput, Field(discriminator="format")]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """A whole conversion. The same recipe on the same checkpoint gives the same bytes."""

    version: Literal[1] = Field(description="Version of the recipe's format.")
    description: str = Field("", max_length=2000, description="One line for people.")
    calibration: Calibration | None = Field(None, description="Text that the methods learn from; null: data-free.")
    imatrix: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None,
        description="An imatrix file of llama.cpp for this model, in place of calibration text; relative to the "
        "recipe's folder.",
    )
    sensitivity: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None,
        description="The folder of a finished `quantkit sensitivity` of this checkpoint, for methods that are "
        "output_aware and outputs with a target; relative to the recipe's folder.",
    )
    tune: AskedTune = Field(
        None,
        description="Tune codes, scales and norms of each whole layer by gradients after it was quantised; true: with "
        "the defaults. Needs calibration, and one output.",
    )
    allow_zeros: bool = Field(
        False,
        description="Take shards with rows of zeros at the end, or long runs of them within, as interrupted downloads "
        "leave them.",
    )
    prune: Prune | None = Field(
        None, description="Routed experts that are left out of every output, before anything is quantised; null: none."
    )
    propagate: Literal["quantized", "original"] = Field(
        "quantized",
        description="Weights that the hidden states pass through: those of the first output, or the original ones.",
    )
    router: Literal["keep", "least_squares"] = Field(
        "keep",
        description="least_squares: routers are changed so that their logits on the quantised stream come near to the "
        "original's on the unquantised one; every output stores the same. Needs calibration text.",
    )
    outputs: Annotated[tuple[Output, ...], Field(min_length=1, max_length=32)] = Field(
        description="Checkpoints to write in one pass."
    )
    validation: Validation | None = Field(None, description="Checked at the end of the conversion; null: not checked.")

    _folder: Path = PrivateAttr(default_factory=Path)

    @classmethod
    def from_yaml(cls, path_or_name: Path | str) -> Recipe:
        """The recipe of a YAML file, or a shipped one by name. Raises `RecipeError`: for each fault a line with file,
        line, key, what was found and what is needed."""
        path = recipe_path(path_or_name)
        return read_model(cls, path).within(path.parent)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], folder: Path | str = ".") -> Recipe:
        """The recipe in plain values, as a YAML file has them. ``folder``: where its relative paths count from. Raises
        `RecipeError` with a line for each fault."""
        return model_of(cls, values).within(folder)

    @staticmethod
    def shipped() -> tuple[str, ...]:
        """Names of the recipes that come with quantkit."""
        return tuple(path.stem for path in shipped_recipes())

    @property
    def folder(self) -> Path:
        """Where relative names of texts and imatrix files count from: the folder of the file that it was read from,
        else the current one. No part of the recipe's content."""
        return self._folder

    def within(self, folder: Path | str) -> Recipe:
        """The same recipe, relative to another folder."""
        moved = self.model_copy()
        moved._folder = Path(folder)  # pyright: ignore[reportAttributeAccessIssue]
        return moved

    def tuned(self) -> Recipe:
        """The same recipe with ``tune``, its own or the defaults. Raises `RecipeError` where that cannot be."""
        values = self.model_dump(mode="json", exclude_unset=True)
        return self if self.tune else Recipe.from_dict({**values, "tune": True}, self.folder)

    @field_validator("outputs")
    @classmethod
    def _names_differ(cls, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        # Folded, because OUT/A and OUT/a are one folder on some file systems.
        names = [output.name.casefold() for output in outputs]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise fault(f"found two outputs named {outputs[place].name!r}, needed different names")
        return outputs

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Recipe:
        if self.tune is not None:
            methods = [m for output in self.outputs for m in (output.method, *(rule.method for rule in output.rules))]
            self.tune.check(methods, self.calibration is not None, self.propagate, len(self.outputs))
        return self

    @model_validator(mode="after")
    def _targets_are_known(self) -> Recipe:
        if not any(output.target is not None for output in self.outputs):
            return self
        if self.calibration is None:
            raise fault("found a target in a data-free recipe, needed calibration (and sensitivity)")
        if self.sensitivity is None:
            raise fault("found a target, needed sensitivity: FOLDER, as `quantkit sensitivity` leaves it")
        return self

    @model_validator(mode="after")
    def _outputs_are_known(self) -> Recipe:
        if not self.output_aware:
            return self
        if self.calibration is None:
            raise fault("found output_aware in a data-free recipe, needed calibration (and sensitivity)")
        if self.sensitivity is None:
            raise fault("found output_aware, needed sensitivity: FOLDER, as `quantkit sensitivity` leaves it")
        return self

    @model_validator(mode="after")
    def _routers_have_two_streams(self) -> Recipe:
        if self.router != "keep" and self.calibration is None:
            raise fault("found router: least_squares in a data-free recipe, needed calibration")
        if self.router != "keep" and self.propagate != "quantized":
            raise fault("found router: least_squares and propagate: original, needed propagate: quantized")
        return self

    @model_validator(mode="after")
    def _experts_are_scored(self) -> Recipe:
        if self.prune is None:
            return self
        if self.calibration is None and self.prune.scores is None:
            raise fault("found prune in a data-free recipe, needed calibration (its text scores the experts) or scores")
        if self.sensitivity is not None:
            raise fault(
                "found prune and sensitivity, needed one of them: the Fisher pass is of the whole model (prune into a "
                "checkpoint that keeps its weights, and make the pass of that)"
            )
        return self

    @property
    def output_aware(self) -> bool:
        """Whether some method takes output Hessians."""
        methods = [method for output in self.outputs for method in (output.method, *(r.method for r in output.rules))]
        return any(method is not None and method.output_aware for method in methods)

    @model_validator(mode="after")
    def _one_source_of_importance(self) -> Recipe:
        if self.calibration is not None and self.imatrix is not None:
            raise fault("found calibration and imatrix, needed one of them (or neither)")
        return self


_ROLES = tuple(role.value for role in Role if role is not Role.VISION)
