"""The member that PEFT's enumeration gains: real, single, and gone from nobody's way."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import peft
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

import peft_fsrl
from peft_fsrl import FSRLConfig, FSRLModel
from peft_fsrl.tuner import registration


def test_the_member_is_a_real_one() -> None:
    member = PeftType["FSRL"]
    assert member is PeftType("FSRL") is PeftType.FSRL
    assert isinstance(member, PeftType)
    assert member == "FSRL"
    assert (member.name, member.value) == ("FSRL", "FSRL")
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(PeftType.__members__) == len(set(PeftType))
    assert hash(member) == hash("FSRL")
    assert member in PeftType


def test_the_member_survives_copies_and_serialization() -> None:
    member = PeftType["FSRL"]
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "FSRL"}


def test_peft_knows_the_method() -> None:
    member = PeftType["FSRL"]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is FSRLConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is FSRLModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "fsrl_" == FSRLModel.prefix
    assert type(peft.get_peft_config({"peft_type": "FSRL", "layer": 1})) is FSRLConfig


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    peft_fsrl.tuner.registration.register()
    importlib.reload(registration).register()
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["FSRL"]] is FSRLConfig


def test_reloading_the_package_changes_nothing() -> None:
    before = list(PeftType)
    importlib.reload(peft_fsrl)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType["FSRL"]] is peft_fsrl.FSRLModel is FSRLModel


def test_a_method_of_peft_itself_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = type("FSRLModel", (), {"__module__": "peft.tuners.fsrl.model"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType["FSRL"], theirs)
    with pytest.raises(ImportError, match=r"own method named FSRL \(peft\.tuners\.fsrl\.model\)"):
        registration.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType["FSRL"]] is theirs
