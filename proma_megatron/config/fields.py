"""What keys are made of: types with limits, names from the tables, and the base of a section."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from proma_megatron.config.choices import ALGORITHMS, ESTIMATORS, LOSSES, RULES

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]  # a shell leaves key=~/x as it is
Fraction = Annotated[float, Field(gt=0, le=1)]

if TYPE_CHECKING:  # a type checker can't look into the tables, as pydantic does
    Algorithm = Rule = LossKind = Estimator = str
else:
    Algorithm, Rule = Literal[*ALGORITHMS], Literal[*RULES]
    LossKind, Estimator = Literal[*LOSSES], Literal[*ESTIMATORS]


class Section(BaseModel):
    """A part of a configuration, which refuses keys that it doesn't have."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
