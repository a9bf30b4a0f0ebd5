"""Changes of the package that its tests must notice, each with the tests that do."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        name: what the mutant does wrong, in a few words.
        file: the file, relative to the package.
        old: text that stands exactly once in it.
        new: what the mutant has instead.
        tests: pytest's names of tests, relative to ``tests/``, of which one at least must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FORMULA = ("test_properties.py::test_steered_output_is_the_formula",)
MODEL = ("test_model.py::test_steers_the_output_of_the_layer",)
KILLED = ("test_checkpoints.py::test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one",)

MUTANTS = (
    # The mathematics
    Mutant(
        "feature activations may become negative",
        "functional.py",
        "return torch.where(v <= -feature_acts, -feature_acts, v)",
        "return v",
        FORMULA,
    ),
    Mutant(
        "nan in the steering vector passes for a suppression",
        "functional.py",
        "return torch.where(v <= -feature_acts, -feature_acts, v)",
        "return torch.where(v > -feature_acts, v, -feature_acts)",
        ("test_nonfinite.py::test_a_broken_adapter_is_counted",),
    ),
    Mutant(
        "suppression is lost",
        "functional.py",
        "return torch.sign(u) * torch.relu(u.abs() - threshold)",
        "return torch.relu(u - threshold)",
        FORMULA,
    ),
    Mutant(
        "the threshold does not shrink, it only gates",
        "functional.py",
        "return torch.sign(u) * torch.relu(u.abs() - threshold)",
        "return u * (u.abs() > threshold)",
        FORMULA,
    ),
    Mutant(
        "a negative threshold steers everything",
        "functional.py",
        "threshold = threshold + torch.relu(-threshold).detach()",
        "threshold = threshold + 0",
        ("test_functional.py::test_a_negative_threshold_acts_as_zero_and_can_come_back",),
    ),
    Mutant(
        "jump_relu reads the logarithm of its threshold as the threshold",
        "functional.py",
        "threshold = torch.exp(log_threshold.to(wide))",
        "threshold = log_threshold.to(wide)",
        FORMULA,
    ),
    Mutant(
        "jump_relu's gradient has the height of u, not of the jump",
        "functional.py",
        "value = positive * active + threshold.detach() * (gate - active)",
        "value = positive * gate",
        ("test_functional.py::test_jump_relu_by_loops",),
    ),
    Mutant(
        "the straight-through kernel is twice as wide",
        "functional.py",
        "kernel = ((u - threshold).abs() < ctx.bandwidth / 2).to(grad.dtype)",
        "kernel = ((u - threshold).abs() < ctx.bandwidth).to(grad.dtype)",
        ("test_functional.py::test_jump_relu_by_loops",),
    ),
    Mutant(
        "an edit that makes v negative is not clamped",
        "functional.py",
        'promotes_only = activation != "soft_threshold" and edit is None',
        'promotes_only = activation != "soft_threshold"',
        ("test_functional.py::test_steer_clamps_what_an_edit_makes_negative",),
    ),
    Mutant(
        "the output takes the SAE's dtype",
        "functional.py",
        "return Steered(x + decode_update(update).to(x.dtype), v, gate)",
        "return Steered(x + decode_update(update), v, gate)",
        ("test_properties.py::test_output_keeps_its_dtype_and_is_rounded_once",),
    ),
    Mutant(
        "the low-rank factor is left out of the bias-free part",
        "functional.py",
        "return F.linear(sae_input if down is None else F.linear(sae_input, down), weight, bias)",
        "return F.linear(sae_input[..., : weight.shape[1]], weight, bias)",
        FORMULA,
    ),
    Mutant(
        "run-time normalisation is not undone",
        "functional.py",
        "return delta if token_scale is None else delta * token_scale",
        "return delta",
        FORMULA,
    ),
    Mutant(
        "the decoder's norms are not undone",
        "functional.py",
        "update = update * feature_scale",
        "update = update * 1",
        ("test_layer.py::test_variants_agree_with_the_formula",),
    ),
    Mutant(
        "padding counts",
        "functional.py",
        "real = torch.ones_like(per_token) if mask is None else (mask > 0).to(per_token.dtype)",
        "real = torch.ones_like(per_token)",
        ("test_properties.py::test_masked_mean_is_a_loop",),
    ),
    Mutant(
        "nan in padding reaches the mean",
        "functional.py",
        "total = torch.where(real > 0, per_token, torch.zeros_like(per_token))",
        "total = per_token * real",
        ("test_properties.py::test_masked_mean_is_a_loop",),
    ),
    Mutant(
        "sequences are weighted by their length",
        "functional.py",
        "return (total.sum(dim=-1) / real.sum(dim=-1).clamp(min=1)).mean()",
        "return total.sum() / real.sum().clamp(min=1)",
        ("test_properties.py::test_masked_mean_is_a_loop",),
    ),
    # The same, as one function
    Mutant(
        "the gradient of what is clamped goes to v",
        "_pointwise.py",
        "        code.mul_(2 - is_free)\n",
        "        pass\n",
        ("test_fused.py::test_passes_gradcheck",),
    ),
    Mutant(
        "what is clamped at zero is free",
        "_pointwise.py",
        ".to(torch.int8).clamp_(min=0)",
        ".to(torch.int8).abs_()",
        ("test_fused.py::test_equals_the_reference",),
    ),
    Mutant(
        "the penalty does not reach what is clamped",
        "_pointwise.py",
        "        g.addcmul_(sign, g_l1)\n",
        "        g.addcmul_(sign * passes, g_l1)\n",
        ("test_fused.py::test_each_output_has_its_own_gradient",),
    ),
    Mutant(
        "the encoder hands no gradient on",
        "fused.py",
        "g_x[rows] += _pull_back(some, [(f, g_f)])",
        "pass",
        ("test_fused.py::test_passes_gradcheck",),
    ),
    Mutant(
        "a token's scale hands no gradient on",
        "fused.py",
        "paths.append((scale, g_scale))",
        "pass",
        ("test_fused.py::test_passes_gradcheck",),
    ),
    Mutant(
        "only the last tokens train the weight",
        "_tiles.py",
        "torch.addmm(total, left.T, right, out=total)",
        "torch.mm(left.T, right, out=total)",
        ("test_fused.py::test_equals_the_reference",),
    ),
    Mutant(
        "one byte per feature is kept where all is recomputed",
        "fused.py",
        "keeps = not operation.recomputes, ctx.needs_input_grad[1]",
        "keeps = True, ctx.needs_input_grad[1]",
        ("test_fused.py::test_bytes_kept_for_the_backward_pass",),
    ),
    Mutant(
        "a hook that got no gradient counts as a penalty",
        "_watch.py",
        "self._penalised |= gradient is not None",
        "self._penalised = True",
        ("test_training_objectives.py::test_a_penalty_that_nobody_adds_is_announced_once",),
    ),
    # The layer
    Mutant(
        "only the last token is steered",
        "layer.py",
        "observer(statistics)\n        return output\n",
        "observer(statistics)\n"
        "        return torch.cat([x[..., :-1, :], output[..., -1:, :]], dim=-2)\n",
        MODEL,
    ),
    Mutant(
        "output_hidden_states shows the unsteered state",
        "layer.py",
        "base_layer.register_forward_hook(self._steer_output, prepend=True)",
        "base_layer.register_forward_hook(self._steer_output)",
        MODEL,
    ),
    Mutant(
        "the adapter reads the raw activations",
        "layer.py",
        "functional.steering_pre(sae.process_in(x), weight",
        "functional.steering_pre(x, weight",
        FORMULA,
    ),
    Mutant(
        "features with a sign are clamped",
        "layer.py",
        "return adapter.non_negative and not sae.signed",
        "return adapter.non_negative",
        FORMULA,
    ),
    Mutant(
        "disable_adapter is ignored",
        "layer.py",
        "        if self.disable_adapters:\n",
        "        if False:\n",
        ("test_model.py::test_disabling_gives_the_base_bit_for_bit",),
    ),
    Mutant(
        "two adapters act on one layer",
        "layer.py",
        "        if len(here) > 1:\n",
        "        if False:\n",
        ("test_layer.py::test_second_adapter_on_a_layer",),
    ),
    Mutant(
        "the SAE is saved with the adapter",
        "layer.py",
        "        self.fsrl_adapter[adapter_name] = adapter\n",
        "        adapter.register_buffer('W_dec', sae.W_dec)\n"
        "        self.fsrl_adapter[adapter_name] = adapter\n",
        ("test_model.py::test_checkpoint_holds_the_adapter_and_nothing_else",),
    ),
    Mutant(
        "a deleted adapter's SAE is kept",
        "layer.py",
        'other_param_names = ("fsrl_sae", "_watches")',
        'other_param_names = ("_watches",)',
        ("test_leaks.py::test_a_layer_without_adapters_steers_nothing",),
    ),
    Mutant(
        "a float16 adapter starts at zero",
        "adapter.py",
        "scale = max(scale, torch.finfo(self.weight.dtype).smallest_normal / 64)",
        "scale = scale",
        ("test_model.py::test_sixteen_bit_start_is_not_dead",),
    ),
    Mutant(
        "the base layer's attributes are not forwarded",
        "layer.py",
        "            return getattr(self.base_layer, name)\n",
        "            raise\n",
        ("test_layer.py::test_public_attributes_are_forwarded_and_private_ones_are_not",),
    ),
    Mutant(
        "private attributes are forwarded",
        "layer.py",
        'if name.startswith("_") or name == "base_layer":',
        'if name == "base_layer":',
        ("test_layer.py::test_public_attributes_are_forwarded_and_private_ones_are_not",),
    ),
    Mutant(
        "a layer that is unloaded goes on steering",
        "layer.py",
        "        self._hook.remove()\n",
        "",
        ("test_leaks.py::test_unloading_leaves_nothing",),
    ),
    Mutant(
        "a layer can be merged",
        "layer.py",
        "        raise ValueError(merge_refusal())\n\n    def unmerge",
        "        self.merged_adapters.append('default')\n\n    def unmerge",
        ("test_layer.py::test_merging_is_refused",),
    ),
    Mutant(
        "a mixed batch is steered by the adapter of its first sample",
        "layer.py",
        "self._steer(name, x[index])",
        "self._steer(adapter_names[0], x[index])",
        ("test_variants.py::test_each_sample_of_a_mixed_batch_is_steered_by_its_own_adapter",),
    ),
    # The model
    Mutant(
        "merging is refused only when a layer is reached",
        "model.py",
        "    def _check_merge_allowed(self) -> None:\n        raise ValueError(merge_refusal())\n",
        "    def _check_merge_allowed(self) -> None:\n        pass\n",
        ("test_model.py::test_merging_is_refused_before_anything_is_changed",),
    ),
    Mutant(
        "an SAE that changed is taken",
        "model.py",
        "if expected is not None and expected != sae.info.fingerprint:",
        "if False:",
        (
            "test_model.py::test_a_changed_sae_is_refused",
            "test_checkpoints.py::test_no_byte_of_the_saes_tensors_can_change_unnoticed",
        ),
    ),
    Mutant(
        "a mixed batch's names stay for the next forward",
        "model.py",
        "                layer.batch_adapter_names = None\n",
        "                pass\n",
        ("test_variants.py::test_each_sample_of_a_mixed_batch_is_steered_by_its_own_adapter",),
    ),
    Mutant(
        "what guards contextual SAEs stays after unloading",
        "model.py",
        "            guard.remove()\n",
        "            pass\n",
        ("test_leaks.py::test_unloading_leaves_nothing",),
    ),
    Mutant(
        "chosen features are off by one",
        "config.py",
        "            return sorted(only)\n",
        "            return [feature + 1 for feature in sorted(only)]\n",
        ("test_variants.py::test_steering_some_features_is_steering_all_with_the_others_zeroed",),
    ),
    # SAEs
    Mutant(
        "rows of a restricted SAE are permuted",
        "_sae_modules.py",
        "    rows = rows.to(module.W_dec.device)\n",
        "    rows = rows.to(module.W_dec.device).flip(0)\n",
        ("test_properties.py::test_some_features_are_all_features_with_the_other_rows_zero",),
    ),
    Mutant(
        "weights are selected where a graph is built",
        "_sparse.py",
        "is_traced() or torch.is_grad_enabled()",
        "is_traced()",
        ("test_sparse.py::test_only_eagerly_and_without_a_graph",),
    ),
    Mutant(
        "only the first token's columns are encoded",
        "_sparse.py",
        "needed.reshape(-1, n_features).any(dim=0)",
        "needed.reshape(-1, n_features)[:1].any(dim=0)",
        ("test_sparse.py::test_every_architecture_and_density",),
    ),
    Mutant(
        "promotions are encoded, suppressions are not",
        "layer.py",
        "sae.encode(x, v < 0 if selects else None)",
        "sae.encode(x, v > 0 if selects else None)",
        ("test_sparse.py::test_every_architecture_and_density",),
    ),
    Mutant(
        "few features are read as if they were many",
        "_sparse.py",
        "    if len(features) > W_dec.shape[0]",
        "    if True or len(features) > W_dec.shape[0]",
        ("test_sparse.py::test_reads_only_what_is_needed",),
    ),
    Mutant(
        "an SAE is saved as it lies in memory",
        "_sae_modules.py",
        "name: t.contiguous() for name, t in",
        "name: t for name, t in",
        ("test_sae.py",),
    ),
    Mutant(
        "the fingerprint does not see the tensors",
        "_identity.py",
        "part.cpu().reshape(-1)",
        "part.cpu()[:1].reshape(-1)",
        ("test_sae.py::test_fingerprint_sees_every_tensor",),
    ),
    Mutant(
        "the fingerprint does not see the settings",
        "_identity.py",
        'json.dumps([cfg["architecture"], settings], sort_keys=True)',
        'json.dumps([cfg["architecture"]])',
        ("test_sae.py::test_fingerprint_sees_settings",),
    ),
    Mutant(
        "rounded tensors pass for the original",
        "sae.py",
        "rounding = self._rounding if exact else "
        '(*self._rounding, str(dtype).removeprefix("torch."))',
        "rounding = self._rounding",
        ("test_sae.py::test_rounded_tensors_are_not_taken_for_the_original",),
    ),
    Mutant(
        "a restricted SAE and the whole one share a place in the table",
        "sae.py",
        "key = (info, str(device), str(dtype), rounding, features)",
        "key = (info, str(device), str(dtype), rounding)",
        ("test_variants.py::test_a_restricted_sae_is_the_whole_one_on_its_features",),
    ),
    Mutant(
        "the SAE keeps the last batch and its graph",
        "sae.py",
        "            self._module.__dict__.pop(name, None)\n",
        "            pass\n",
        ("test_sae.py::test_no_graph_is_kept",),
    ),
    Mutant(
        "resid_pre is taken for the same layer's output",
        "sae_sources.py",
        'HookPoint(layer - 1, "resid_post") if layer > 0 else None',
        'HookPoint(layer, "resid_post") if layer > 0 else None',
        ("test_sae.py::test_parse_hook_layer",),
    ),
    Mutant(
        "pickles in an SAE's folder are opened",
        "sae_sources.py",
        "    return load_folder(path)\n",
        "    import pickle\n"
        "    for file in path.glob('*.p*'):\n"
        "        pickle.loads(file.read_bytes())\n"
        "    return load_folder(path)\n",
        ("test_checkpoints.py::test_pickles_in_an_saes_folder_are_not_opened",),
    ),
    # Observing and editing
    Mutant(
        "the scale is ignored",
        "steering.py",
        "return v * scale if scale else torch.zeros_like(v)",
        "return v",
        ("test_steering.py::test_edits",),
    ),
    Mutant(
        "top-k keeps the largest, not the largest in size",
        "steering.py",
        "top = v.abs().topk(n, dim=-1).indices",
        "top = v.topk(n, dim=-1).indices",
        ("test_variants.py::test_top_k_keeps_the_largest",),
    ),
    Mutant(
        "an edit stays after its block",
        "steering.py",
        "            layer.edits.remove(edit)\n",
        "            pass\n",
        ("test_steering.py::test_edits",),
    ),
    Mutant(
        "an observer stays after its block",
        "steering.py",
        "            layer.observers.remove(observer)\n",
        "            pass\n",
        ("test_steering.py::test_edits_end_with_an_exception",),
    ),
    Mutant(
        "evaluation is taken for training",
        "steering.py",
        "module.training and torch.is_grad_enabled()",
        "torch.is_grad_enabled()",
        ("test_steering.py::test_monitor_tells_training_apart",),
    ),
    Mutant(
        "nan that the base model gives is not counted",
        "events.py",
        " & hidden_states.detach().isfinite().all(dim=-1)",
        "",
        ("test_nonfinite.py::test_what_the_base_model_gives_counts_where_nothing_is_steered",),
    ),
    Mutant(
        "nan in padding is reported",
        "nonfinite.py",
        "                bad = bad * (record.mask > 0).to(bad)\n",
        "                pass\n",
        ("test_nonfinite.py::test_the_report_counts_real_tokens_and_names_the_place",),
    ),
    # Checkpoints
    Mutant(
        "files are written over the old ones, as PEFT does",
        "_saving.py",
        "            return original(self, str(staging), *args, **kwargs)\n",
        "            return original(self, str(save_directory), *args, **kwargs)\n",
        KILLED,
    ),
    Mutant(
        "a save that was killed is not finished by who reads next",
        "_saving.py",
        "            finish_save(folder)\n        config =",
        "            pass\n        config =",
        KILLED,
    ),
    Mutant(
        "a save is committed before it is complete",
        "_checkpoints.py",
        "    os.rename(staging, folder / _SAVED)\n",
        "    shutil.copytree(staging, folder / _SAVED)\n",
        KILLED,
    ),
    Mutant(
        "weights that changed are loaded",
        "_checkpoints.py",
        "            raise ValueError(message)\n",
        "            continue\n",
        ("test_checkpoints.py::test_no_byte_of_the_weights_can_change_unnoticed",),
    ),
    Mutant(
        "missing tensors start at random",
        "_saving.py",
        "    if missing or foreign:\n",
        "    if False:\n",
        ("test_checkpoints.py::test_loading_over_an_adapter_checks_as_well",),
    ),
    Mutant(
        "weights of the other kind stay and are read instead",
        "_checkpoints.py",
        "                (folder / name).unlink(missing_ok=True)\n",
        "                pass\n",
        ("test_checkpoints.py::test_weights_of_the_other_kind_do_not_stay",),
    ),
)
