"""The tests of PEFT's that may be skipped for FSRL, and why.

A skip that no entry allows fails the run, and so does an entry that allows nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class AllowedSkip(NamedTuple):
    """Tests that may be skipped.

    Attributes:
        group: why these tests do not apply to FSRL, in a few words, under which they are counted.
        tests: regular expression that the test's own name matches whole, without parameters.
        reason: regular expression that the start of the skip's own reason matches.
    """

    group: str
    tests: str
    reason: str

    def allows(self, test: str, reason: str) -> bool:
        """Whether it allows the skip of ``test`` (``file::Class::name[parameters]``)."""
        name = test.partition("[")[0].rpartition("::")[2]
        return bool(re.fullmatch(self.tests, name) and re.match(self.reason, reason))


# The update depends on the input, so there is nothing to merge. What comes before the merge has
# run in every one of these, and the refusal itself has been seen.
_MERGING = "merging: refused"
_MERGE_REFUSED = "Refused: An FSRL adapter cannot be merged"
# f' = relu(f + v) does not distribute over a sum of adapters. Up to there the tests have run.
_COMBINING = "several active adapters on one layer: refused"
_COMBINATION_REFUSED = "Refused: Only one FSRL adapter can be active on a layer"
# FSRL has no option that trains the base model's biases.
_BIAS = "bias: training the base model's biases is no option of FSRL"
_PROMPT = "prompt learning: FSRL is none"
_LORA = "weighted combination of adapters: LoRA and IA3 only"

ALLOWED = (
    AllowedSkip(_MERGING, r"test_merge_layers(_\w+)?", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_safe_merge", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_disable_adapters_with_merging", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_delete_merged_adapter_\w+", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_mixed_adapter_batches_merged_raises", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_multiple_active_adapters_merge_and_unmerge", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_sequential_merge_matches_batch_merge", _MERGE_REFUSED),
    AllowedSkip(_MERGING, r"test_unmerge_after_sequential_merge_restores_base", _MERGE_REFUSED),
    # Their last lines merge; the forward passes that give them their names come before.
    AllowedSkip(_MERGING, r"test_forward_b?float16(_no_autocast)?", _MERGE_REFUSED),
    # PEFT means to leave out BEFT here, which cannot merge into layers without a bias, and takes
    # every method for it.
    AllowedSkip(
        "merging: PEFT's gate for BEFT on Llama",
        r"test_merge_layers(_\w+)?",
        "Skip tests for Llama models because layers have no bias term",
    ),
    AllowedSkip(_COMBINING, r"test_active_adapter", _COMBINATION_REFUSED),
    AllowedSkip(
        _COMBINING,
        r"test_multiple_active_adapters_(forward|merge_and_unmerge)",
        _COMBINATION_REFUSED,
    ),
    AllowedSkip(
        _COMBINING,
        r"test_multiple_active_adapters_with_different_modules_to_save_works",
        _COMBINATION_REFUSED,
    ),
    AllowedSkip(
        "several active adapters with modules_to_save: not supported by PEFT",
        r"test_active_adapter",
        "Multiple active adapters with modules_to_save",
    ),
    AllowedSkip(
        _BIAS, r"test_adding_multiple_adapters_with_bias_raises", r".* does not support the 'bias'"
    ),
    AllowedSkip(_BIAS, r"test_disable_adapter_with_bias_warns", "Testing bias warnings only for"),
    AllowedSkip(
        _BIAS,
        r"test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
        "This test requires the PEFT method to support training the bias directly",
    ),
    AllowedSkip(
        _PROMPT,
        r"test_prompt_tuning_(text|sample_vocab)_prepare_for_training",
        "This test does not apply to",
    ),
    AllowedSkip(_PROMPT, r"test_training_prompt_learning_tasks", "Test not applicable for"),
    AllowedSkip(
        _PROMPT,
        r"test_set_requires_grad_prompt_learning_raises",
        "This test is only for prompt learning methods",
    ),
    # The same test runs for FSRL on the decoder models, where PEFT does not gate it.
    AllowedSkip(
        _PROMPT, r"test_passing_input_embeds_works", "Skip tests that are not prompt learning"
    ),
    AllowedSkip(_LORA, r"test_weighted_combination_of_adapters", "Test not applicable for"),
)
