"""FSRL's rows in PEFT's test matrices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import tiny

from peft_fsrl import FSRLConfig

# A start at which every fresh adapter visibly changes the output, as PEFT's tests want it from
# `init_lora_weights=False`.
VISIBLE_SCALE = 1.0
# Encoder layers, and the decoder layers of a classifier, under any name in front.
_ENCODER_LAYER = r"(.*\.)?(encoder\.layer|layers)\.1"
_SEQ2SEQ_LAYER = r"(.*\.)?decoder\.(layers|block)\.1"


class MLPConfig(FSRLConfig):
    """For tests that make a config from ``target_modules`` alone, on a layer of width 20."""

    width = 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("sae", tiny.tiny_sae(self.width))
        super().__init__(*args, **kwargs)


class DeepMLPConfig(MLPConfig):
    """The same on a layer of width 256."""

    width = 256


def custom_cases(jump_start: float = 1e-9) -> list[Any]:
    """``(test_name, model_id, config_cls, config_kwargs)`` for PEFT's small custom models.

    Args:
        jump_start: where thresholds and weights of ``jumprelu`` start. A gate has a gradient only
            near its threshold, so that no start both leaves the output unchanged and trains
            thresholds within the three steps that PEFT's tests make.
    """
    jump = {"activation": "jumprelu", "init_threshold": jump_start, "init_scale": jump_start}
    lin0: dict[str, Any] = {"target_modules": ["lin0"], "sae": tiny.tiny_sae(20)}
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("MLP", lin0),
        "linear of width 2": ("MLP", {"target_modules": ["lin1"], "sae": tiny.tiny_sae(2)}),
        "regex": ("MLP", {**lin0, "target_modules": "lin.", "exclude_modules": ["lin1"]}),
        "relu": ("MLP", {**lin0, "activation": "relu"}),
        "jumprelu": ("MLP", {**lin0, **jump, "jumprelu_bandwidth": 10.0}),
        "features": ("MLP", {**lin0, "features": [0, 3, 4, 11, 29]}),
        "exclude_features": ("MLP", {**lin0, "exclude_features": [1, 2]}),
        "rank": ("MLP", {**lin0, "rank": 4}),
        "modules_to_save": ("MLP", {**lin0, "modules_to_save": ["lin1"]}),
        "jumprelu SAE": ("MLP", {**lin0, "sae": tiny.tiny_sae(20, "jumprelu")}),
        "topk SAE": ("MLP", {**lin0, "sae": tiny.tiny_sae(20, "topk")}),
        "gated SAE": ("MLP", {**lin0, "sae": tiny.tiny_sae(20, "gated")}),
        "layer_norm SAE": ("MLP", {**lin0, "sae": tiny.tiny_sae(20, "standard", "layer_norm")}),
        "bfloat16 SAE": ("MLP", {**lin0, "sae_dtype": "bfloat16"}),
        "LayerNorm": (
            "MLP_LayerNorm",
            {"target_modules": ["layernorm1"], "sae": tiny.tiny_sae(20)},
        ),
        "embedding": ("EmbConv1D", {"target_modules": ["emb"], "sae": tiny.tiny_sae(5)}),
        "attention": ("MHA", {"target_modules": ["mha"], "sae": tiny.tiny_sae(10)}),
        "bare parameters": ("MlpUsingParameters", lin0),
    }
    return [
        pytest.param(name, model, FSRLConfig, kwargs, id=f"{name}-{model}".replace(" ", "_"))
        for name, (model, kwargs) in rows.items()
    ]


def decoder_cases() -> list[Any]:
    """``(config_cls, config_kwargs)`` for language models of every family."""
    return [
        pytest.param(FSRLConfig, {"task_type": "CAUSAL_LM", **kwargs}, id=name)
        for name, kwargs in {
            "soft_threshold": {"layer": 1, "sae": tiny.tiny_sae()},
            "jumprelu": {
                "layer": 0,
                "sae": tiny.tiny_sae(architecture="jumprelu"),
                "activation": "jumprelu",
                # Close to the base, as PEFT's tests ask, and with gates that are open.
                "init_threshold": 1e-9,
                "init_scale": 1e-9,
            },
            "two_layers_relu": {
                "layer": [0, 2],
                "sae": {0: tiny.SAE_FOLDER, 2: tiny.tiny_sae()},
                "activation": "relu",
            },
        }.items()
    ]


def module_cases(task_type: str, target_modules: str | list[str] = _ENCODER_LAYER) -> list[Any]:
    """``(config_cls, config_kwargs)`` for models whose layer is named by ``target_modules``."""
    kwargs = {"target_modules": target_modules, "sae": tiny.tiny_sae(), "task_type": task_type}
    return [pytest.param(FSRLConfig, kwargs, id="fsrl")]


def active_adapter_cases() -> list[Any]:
    """``(test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2)`` on the MLP."""
    lin0 = {"target_modules": ["lin0"], "sae": tiny.tiny_sae(20), "init_scale": VISIBLE_SCALE}
    lin1 = {"target_modules": ["lin1"], "sae": tiny.tiny_sae(2), "init_scale": VISIBLE_SCALE}
    return [
        pytest.param("FSRL Same", "fsrl", FSRLConfig, lin0, lin0, id="same_layer"),
        pytest.param("FSRL Different", "fsrl", FSRLConfig, lin0, lin1, id="other_layer"),
    ]


def mixed_cases(second: str = "lin0", **settings: Any) -> list[Any]:
    """``(test_name, config0, config1)`` for two adapters in one batch, on the MLP."""
    widths = {"lin0": 20, "lin1": 2}
    configs = [
        FSRLConfig(
            target_modules=[target],
            sae=tiny.tiny_sae(widths[target]),
            init_scale=VISIBLE_SCALE,
            **settings,
        )
        for target in ("lin0", second)
    ]
    return [pytest.param("FSRL mixed adapter", *configs, id="fsrl")]


def supports_layer_indexing() -> bool:
    """PEFT's own criterion for its tests of ``layers_to_transform``."""
    return {"layers_to_transform", "layers_pattern"} <= set(
        inspect.signature(FSRLConfig).parameters
    )


def matrices() -> dict[str, dict[str, Sequence[Any]]]:
    """FSRL's rows by test file, and in it by the list of PEFT's or the test that they replace."""
    mlp = [pytest.param(MLPConfig, id="fsrl")]
    config = [pytest.param(FSRLConfig, {}, id="fsrl")]
    fresh = mixed_cases()[0].values[1]
    return {
        "test_custom_models": {
            "TEST_CASES": custom_cases(),
            "ALL_PEFT_CONFIG_CLASSES": [pytest.param(DeepMLPConfig, id="fsrl")],
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": active_adapter_cases(),
            "MIXED_ADAPTER_TEST_CASES": mixed_cases(),
            "test_mixed_adapter_batches_different_target_layers": mixed_cases("lin1"),
            "test_mixed_adapter_batches_multiple_modules_to_save": mixed_cases(
                modules_to_save=["lin1"]
            ),
            "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [
                pytest.param("FSRL wrong adapter name", fresh, id="fsrl")
            ],
            "test_multiple_adapters_mixed_modules_to_save": mlp,
            "test_multiple_adapters_mixed_modules_to_save_order_switched": mlp,
            "test_adapter_name_makes_no_difference": [pytest.param(fresh, id="fsrl")],
            # PEFT gives other methods a visible start in this test, for the same reason.
            "test_only_params_are_updated": custom_cases(jump_start=VISIBLE_SCALE),
        },
        "test_decoder_models": {
            "PEFT_DECODER_MODELS_TO_TEST": list(tiny.DECODERS),
            "ALL_CONFIGS": decoder_cases(),
            # Seconds each: beam search, five times.
            "test_generate_with_mixed_adapter_batches": decoder_cases()[:1],
            # One module in every layer, for the test to choose layers by index.
            "test_training_decoders_layer_indexing": module_cases(
                "CAUSAL_LM", ["mlp", "final_layer_norm"]
            ),
        },
        "test_encoder_decoder_models": {
            "PEFT_ENCODER_DECODER_MODELS_TO_TEST": list(tiny.ENCODER_DECODERS),
            "ALL_CONFIGS": module_cases("SEQ_2_SEQ_LM", _SEQ2SEQ_LAYER),
            "test_training_encoder_decoders_layer_indexing": module_cases(
                "SEQ_2_SEQ_LM", ["SelfAttention", "final_layer_norm"]
            ),
        },
        "test_feature_extraction_models": {
            "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": list(tiny.ENCODERS),
            "ALL_CONFIGS": module_cases("FEATURE_EXTRACTION"),
            "test_training_layer_indexing": module_cases("FEATURE_EXTRACTION", ["output"]),
        },
        "test_seq_classifier": {
            "PEFT_SEQ_CLS_MODELS_TO_TEST": list(tiny.CLASSIFIERS),
            "ALL_CONFIGS": module_cases("SEQ_CLS"),
        },
        "test_token_classification_qa": {
            "PEFT_TOKEN_CLS_MODELS_TO_TEST": list(tiny.CLASSIFIERS[:2]),
            "TOKEN_CLS_CONFIGS": module_cases("TOKEN_CLS"),
            "QA_CONFIGS": module_cases("QUESTION_ANS"),
        },
        "test_config": {
            "PEFT_MODELS_TO_TEST": [(tiny.LORA_ADAPTER, "main")],
            "ALL_CONFIG_CLASSES": config,
            **({"LAYER_INDEXING_CONFIG_CLASSES": config} if supports_layer_indexing() else {}),
        },
    }
