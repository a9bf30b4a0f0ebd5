"""Make PEFT know the method ``FSRL``: the only file that touches PEFT's tables.

Safe to run twice.
"""

from __future__ import annotations

from typing import Any, cast

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method

NAME = "FSRL"


def add_peft_type() -> PeftType:
    """Add the member ``FSRL`` to PEFT's enumeration of methods, or return the one added before.

    PEFT offers no way to extend the enumeration from outside, and its tables are keyed by members.

    Raises:
        ImportError: if PEFT itself ships a method of this name.
    """
    if NAME in PeftType.__members__:
        member = PeftType[NAME]
        owner = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
        if owner is not None and not owner.__module__.startswith("peft_fsrl"):
            raise ImportError(
                f"This version of PEFT has its own method named {NAME} ({owner.__module__}), which "
                "peft_fsrl would replace. Uninstall peft_fsrl, or install the PEFT version that it "
                "was tested with."
            )
        return cast(PeftType, member)
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # From Python 3.12 on, members are found as class attributes before the maps are consulted.
    type.__setattr__(PeftType, NAME, member)
    tables: Any = PeftType
    tables._member_names_.append(NAME)
    tables._member_map_[NAME] = member
    tables._value2member_map_[NAME] = member
    if hasattr(tables, "_hashable_values_"):
        tables._hashable_values_.append(NAME)
    return member


def register() -> None:
    """Register ``FSRLConfig`` and ``FSRLModel`` with PEFT; a second call rebinds them."""
    member = add_peft_type()
    from .config import FSRLConfig
    from .model import FSRLModel

    if member in PEFT_TYPE_TO_TUNER_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = FSRLConfig
        PEFT_TYPE_TO_TUNER_MAPPING[member] = FSRLModel
        PEFT_TYPE_TO_PREFIX_MAPPING[member] = FSRLModel.prefix
        return
    register_peft_method(name=NAME.lower(), config_cls=FSRLConfig, model_cls=FSRLModel)
