"""One way of breaking each law, or more: the code is changed so, and a test of the law must fail.

python tests/laws/breaks.py            # all laws, in a copy of the tree; what each test said of the broken code
python tests/laws/breaks.py 9 37       # some of them
"""

# ruff: noqa: E501 (lines of the code are quoted whole: each must be found as it stands)

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from law_table import TABLE

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ("dpscale", "launch", "tests", "configs", "slurm", "docs", "pyproject.toml", "README.md")
MOST_SECONDS = 600


class Break(NamedTuple):
    """In `file` (of dpscale/), `old` (there once) becomes `new`; `test` must fail: "file::function", of the law's, or one
    case of it, "file::function[case]"."""

    row: int
    file: str
    old: str
    new: str
    test: str


NOISE_LINE = "        total = add_gaussian_noise(total, noise_key, jnp.float32(plan.noise_stddev))\n"
DIVIDED = "    gradient = cut(total / jnp.float32(plan.expected_batch_size), state.params)\n"
STEP, SAMPLING, BATCHING, SECRET = (
    "test_step::test_",
    "test_sampling::test_",
    "test_batching::test_",
    "privacy/secret.py",
)
SECRETS, SESSION = "test_secret::test_", "test_session::test_"

BREAKS = [
    Break(1, SECRET, "secret = cls(os.urandom(SECRET_BYTES))", "secret = cls(bytes(SECRET_BYTES))",
          SECRETS + "two_runs_have_different_secrets_and_loading_gives_back_the_same"),
    Break(2, SECRET, "        data = seed.to_bytes(max(1,", "        seed %= 2**32\n        data = seed.to_bytes(max(1,",
          SECRETS + "insecure_seeds_keep_all_their_bits_and_are_marked"),
    Break(3, SECRET, "_prefixed(purpose) + attempt.to_bytes(8", "attempt.to_bytes(8",
          SECRETS + "all_keys_over_steps_attempts_and_purposes_are_distinct"),
    Break(4, "step.py", DIVIDED, DIVIDED.replace("plan.expected_batch_size", "plan.sampling_rate * plan.num_examples"),
          "laws/test_04_number_of_examples::"
          "test_with_one_record_less_a_fixed_plan_gives_the_same_numbers_and_programs"),
    Break(5, "sampling.py", "    return Fraction(rate)\n", "    return Fraction(-(-Fraction(rate) * 2**23 // 1), 2**23)\n",
          SAMPLING + "realised_rate_at_one_in_a_million_is_not_rounded"),
    Break(6, "sampling.py", "        return uniform_subset(stream, self.num_examples, size)\n",
          "        half = self.num_examples // 2\n        one = uniform_subset(stream, half, min(half, size // 2))\n"
          "        return np.r_[one, one + half]\n",
          SAMPLING + "inclusion_is_uncorrelated_within_and_across_shard_boundaries"),
    Break(7, "replicas.py", "if len(different):", "if len(different) > len(rows):",
          "test_replicas::test_one_device_that_differs_is_seen"),
    Break(8, "loop.py", "keys.noise(step))", "keys.noise(step - steps.start))",
          "test_resume::test_a_stop_reports_the_steps_that_ran_and_the_run_goes_on_to_the_same_end"),
    Break(9, "step.py", NOISE_LINE, NOISE_LINE.replace("plan.noise_stddev", "1.01 * plan.noise_stddev"),
          "statistical/test_step_noise::test_the_variance_is_that_of_the_plan_and_not_one_percent_off"),
    Break(10, "step.py", "jax.lax.psum(join((sums.gradient,", "jax.lax.pmean(join((sums.gradient,",
          STEP + "a_planted_unit_gradient_is_exactly_what_the_output_has_more_than_the_known_noise"),
    Break(11, "step.py", "lambda total, part: total + part[None],",
          "lambda total, part: total + (part + clip_norm * jax.random.normal(typed_key, part.shape))[None],",
          STEP + "noise_is_drawn_once_per_logical_step_whatever_the_number_of_accumulations"),
    Break(12, "step.py", "lambda total, part: total + part[None],",
          "lambda total, part: (total + part[None]).astype(jnp.bfloat16).astype(jnp.float32),",
          STEP + "a_sum_of_257_ones_is_257_also_where_the_model_computes_in_bfloat16"),
    Break(13, "noise.py", "(low.astype(jnp.float32) + np.float32(0.5)) * np.float32(2.0**-64)",
          "np.float32(2.0**-33) + 0 * low.astype(jnp.float32)",
          "test_noise::test_the_tails_reach_past_nine_sigma_and_the_smallest_radius_is_not_zero"),
    Break(14, "step.py", NOISE_LINE, NOISE_LINE.replace("total = add", "total = jnp.where(total == 0, total, add")
          .replace("stddev))\n", "stddev)))\n"),
          STEP + "with_zero_gradients_every_trainable_leaf_moves_also_one_that_the_loss_never_uses"),
    Break(15, "step.py", NOISE_LINE, NOISE_LINE.replace("stddev))", "stddev) * jnp.sqrt(statistics[0]))"),
          STEP + "the_noise_does_not_change_with_the_realised_batch_size"),
    Break(16, "noise.py", "lax.dynamic_slice(normals, (here.offset,), (size,))", "lax.dynamic_slice(normals, (0,), (size,))",
          "test_noise::test_shards_get_the_noise_of_the_whole_vector"),
    Break(17, "clipping/norms.py", "    upper = jnp.square(jnp.sqrt(ghost + kappa * jnp.square(spread) + flushed) + 2 * delta * spread)\n",
          "    upper = ghost\n",
          "test_clipping_norms::test_contribution_stays_within_the_bound_where_ghost_norms_cancel"),
    Break(17, "clipping/layers.py", "factor * share.astype(factor.dtype), 0)", "factor, 0)",
          "test_clipping_second_pass::test_no_example_gives_more_than_the_first_pass_measured"),
    Break(17, "clipping/engine.py", "        squares = held(squares, problem.mask)\n", "        pass\n",
          "test_clipping_second_pass::test_the_norm_that_factors_are_made_of_is_the_one_that_sums_keep_to"),
    Break(17, "clipping/engine.py", "    problem = with_constants_held(parts, problem)\n", "",
          "test_clipping_hold::test_what_sums_are_made_of_is_made_once_wherever_it_comes_from"),
    Break(17, "clipping/rows.py", "set(parts.program.inputs[: len(parts.layers)])", "set(parts.program.inputs)",
          "test_clipping_hold::test_what_sums_are_made_of_is_made_once_wherever_it_comes_from"),
    Break(18, "clipping/dense.py", "jnp.where(factor != 0, wide * factor.astype(wide.dtype), 0)",
          "(wide * factor.astype(wide.dtype))",
          "test_clipping_split::test_bad_rows_and_padding_leave_the_bits_of_the_others"),
    Break(18, "clipping/split.py", "            equation.apply = batched_convolution(equation.apply)\n", "            pass\n",
          "test_clipping_split::test_bad_rows_and_padding_leave_the_bits_of_the_others"
          "[grouped_conv_whose_kernel_follows_the_example-bookkeeping]"),
    Break(18, "clipping/example.py",
          "    return jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))\n",
          "    return keep.reshape(keep.shape + (1,) * (x.ndim - 1)).astype(x.dtype) * x\n",
          "test_clipping_reference::test_batches_without_any_good_row_give_zero"),
    Break(19, "step.py", "gather(table, rows.arrays), rows.mask, keys", "gather(table, rows.arrays), rows.mask | True, keys",
          STEP + "padding_and_bad_rows_leave_the_same_bits_as_rows_that_are_not_there"),
    Break(20, "loop.py", "        for rows in batches(step):\n",
          "        physical = list(batches(step))\n        if not physical:\n            continue\n"
          "        for rows in physical:\n",
          "test_loop::test_an_empty_first_draw_and_any_later_one_compile_nothing_after_the_start"),
    Break(21, "batching.py", "return -(-max(num_rows, self.padded_to) // self.rows_per_accumulation)",
          "return max(num_rows, self.padded_to) // self.rows_per_accumulation",
          BATCHING + "draws_larger_than_planned_lose_no_row"),
    Break(22, "step.py", DIVIDED, DIVIDED.replace("jnp.float32(plan.expected_batch_size)", "jnp.maximum(statistics[0], 1)"),
          STEP + "the_divisor_is_the_public_expected_batch_size_never_the_realised_one"),
    Break(23, "models/functional.py", "    if has_batch_statistics:\n", "    if has_batch_statistics and not name:\n",
          "test_models::test_batch_norm_is_refused_with_a_message_that_names_group_norm"),
    # Of K views, each clipped by itself, the sum may move by K clip norms.
    Break(24, "clipping/bounds.py", "_clip_factors(norms, [self.clip_norm])", "_clip_factors(norms, [3 * self.clip_norm])",
          "test_data_augmentation::"
          "test_all_views_of_one_example_move_the_sum_by_at_most_the_clip_norm"),
    Break(25, "task.py", "    return replace(task, origin=origin, notes=()",
          "    plain, decay = task.loss, config.optimizer.weight_decay or 0.0\n"
          "    squares = lambda p: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(p))\n"
          "    task = replace(task, loss=lambda p, *rest: plain(p, *rest) + decay / 2 * squares(p))\n"
          "    return replace(task, origin=origin, notes=()",
          "test_optimizer::test_weight_decay_takes_no_share_of_the_clip_norm"),
    Break(25, "optimizer.py", "optax.chain(moments, optax.add_decayed_weights(config.weight_decay or 0.0))",
          "optax.chain(optax.add_decayed_weights(config.weight_decay or 0.0), moments)",
          "test_optimizer::test_weight_decay_is_decoupled_from_the_gradient"),
    Break(26, "step.py", DIVIDED, DIVIDED.replace("(total /", "((total + 1e-3 * statistics[3]) /"),
          STEP + "statistics_and_requests_never_touch_the_state"),
    Break(27, SECRET, "+ attempt.to_bytes(8, \"little\") + step", "+ step",
          SECRETS + "all_keys_over_steps_attempts_and_purposes_are_distinct"),
    Break(28, "program.py", '    facts["loss"] = _program_digest(loss, params, example, uses_key)\n', '    facts["loss"] = ""\n',
          "test_program::test_the_last_bit_of_a_constant_anywhere_in_the_loss_is_seen"),
    Break(29, "privacy/ledger.py", "return sum(attempt.steps for attempt in self.attempts)",
          "return max((attempt.end for attempt in self.attempts), default=0)",
          "test_ledger::test_charges_are_the_sum_over_attempts"),
    Break(30, "train.py", "self.ledger.close(self.briefing.attempt, durable, max(durable, self.range_end))",
          "self.ledger.close(self.briefing.attempt, durable, durable)",
          "test_crash_points::"
          "test_a_checkpoint_that_is_durable_late_lowers_no_charge_of_what_was_begun_meanwhile"),
    Break(31, "lease.py", "            if holder is not None and not (_same",
          "            if holder is not None and holder.job is not None and not (_same",
          "test_lease::test_a_second_run_is_refused_and_told_who_holds_it"),
    Break(32, "session.py", "    changed = old.differences(plan)\n", "    changed: list[str] = []\n",
          SESSION + "a_change_is_refused_with_the_difference_and_changes_nothing"),
    Break(33, "manifest.py", "        if _file_digest(file) != digest:\n", "        if not digest:\n",
          "test_checkpoint::test_a_bad_checkpoint_is_set_aside_with_a_word_and_the_one_before_is_used"),
    Break(34, "metrics/recorder.py", "        finite = max(statistics.examples",
          "        self._public.write(step, learning_rate=statistics.loss)\n        finite = max(statistics.examples",
          "laws/test_34_public_logs::test_what_runs_on_neighbouring_data_sets_make_public_is_equal"),
    Break(35, "release.py", "    write_weights(stage / WEIGHTS, params)\n",
          "    every = read_parameters(path, \"opt_state\")\n"
          "    write_weights(stage / WEIGHTS, {**params, \"opt_state\": every})\n",
          "test_release::test_a_release_holds_no_leaf_but_the_weights_no_secret_and_nothing_of_the_runs_other_files"),
    Break(36, "batching.py", "(plan.max_batch_size or 0) if config.privacy.constant_time else 0", "0",
          "test_train::test_in_constant_time_every_step_takes_as_many_accumulations_and_the_result_is_the_same"),
    Break(37, "data/arrays.py", "        labels = np.asarray(self._labels[indices])",
          "        if features.dtype.kind == \"f\":\n            features = features - np.mean(self._features, axis=0)\n"
          "        labels = np.asarray(self._labels[indices])",
          "test_transforms::test_changing_one_record_changes_no_other_records_features"),
    Break(38, "privacy/card.py", '    if unit == USER:\n        return f"one user', '    if unit == "":\n        return f"one user',
          "test_card::test_user_level_privacy_is_printed_with_its_bound"),
    Break(39, "batching.py", "self.rows_per_accumulation + positions * self.physical_batch_size",
          "self.rows_per_accumulation + 0 * positions", BATCHING + "all_processes_together_load_exactly_the_draw"),
    Break(40, "release.py", "    if missing and record.plan.enabled", "    if missing and not record.plan.enabled",
          "test_release::test_what_only_the_owner_knows_must_be_stated"),
    Break(41, "privacy/plan.py", '            "sampling_rate": rate,\n',
          '            "sampling_rate": config.performance.physical_batch_size / num_examples\n'
          '            if isinstance(config.performance.physical_batch_size, int) else rate,\n',
          "test_plan::test_epsilon_is_the_same_for_any_physical_batch"),
    Break(42, "session.py", "        return self.charged_before + step - self.attempt_start\n", "        return self.plan.steps\n",
          "test_resume::test_a_stop_reports_the_steps_that_ran_and_the_run_goes_on_to_the_same_end"),
    Break(43, "privacy/accounting.py", "    return rounded if spent(rounded) <= epsilon else sigma\n", "    return 0.999 * sigma\n",
          "test_accounting::test_calibration_never_overshoots_and_wastes_at_most_1e_4_of_the_noise"),
    Break(44, "train.py", "            self.plan.num_examples,\n            self.plan.sampling_rate,\n",
          "            self.plan.num_examples,\n            min(1.0, 1.01 * self.plan.sampling_rate),\n",
          "laws/test_34_public_logs::test_the_run_samples_with_the_very_numbers_that_it_accounts"),
    Break(45, "privacy/sensitivity.py", '(2 if neighboring_relation == "replace_one" else 1)', "1",
          "test_sensitivity::test_one_record_moves_the_sum_by_at_most_the_sensitivity_and_some_record_by_nearly_that"),
    Break(46, "step.py", "    if plan.enabled:\n" + NOISE_LINE + DIVIDED,
          "    total = total / jnp.float32(plan.expected_batch_size)\n    if plan.enabled:\n" + NOISE_LINE
          + "    gradient = cut(total, state.params)\n",
          STEP + "clip_then_reduce_then_noise_then_divide_then_optimizer"),
    Break(47, "sampling.py", "            size = min(size, self.max_batch_size)\n",
          "            return uniform_subset(stream, self.num_examples, size)[: self.max_batch_size]\n",
          SAMPLING + "truncation_keeps_a_fresh_uniform_subset"),
    Break(48, "loop.py", "keys.noise(step))\n",
          "jax.jit(lambda: jax.numpy.asarray(keys.noise(step)))())\n",
          "laws/test_48_programs::test_no_program_that_a_run_compiles_holds_a_key_or_a_record"),
    Break(49, "session.py", "    if current is None or reasons:\n",
          "    if current is None or reasons or current.end > start:\n",
          "test_resume::test_killed_at_a_few_moments_it_ends_as_if_nothing_had_happened"),
    Break(49, "loop.py", "keys.noise(step))\n", "keys.noise(len(in_flight)))\n",
          "test_loop::test_noise_keys_follow_the_step_not_the_place_in_the_loop"),
    Break(50, SECRET, "            file.write(os.urandom(max(os.fstat(file.fileno()).st_size, 2 * SECRET_BYTES + 1)))\n", "",
          "test_release::test_destroying_the_secret_ends_the_run_for_good"),
    # Of three records of a user, each clipped by itself, the sum may move by three clip norms.
    Break(51, "clipping/bounds.py", "_clip_factors(norms, [self.clip_norm])", "_clip_factors(norms, [3 * self.clip_norm])",
          "test_data_users::"
          "test_a_users_records_are_summed_before_the_norm_so_one_user_moves_the_sum_by_the_clip_norm_at_most"),
    Break(51, "data/users.py", "_TAG + _id_bytes(self._ids[user])", '_TAG + user.to_bytes(8, "little")',
          "test_data_users::test_which_records_of_a_user_are_used_does_not_change_with_other_users_data"),
]  # fmt: skip


def planted(text: str, plan: Break) -> str:
    """`text` with the break. Raises: ValueError unless what it changes is there once."""
    if text.count(plan.old) != 1:
        raise ValueError(
            f"law {plan.row}: {plan.file} holds what is to be changed {text.count(plan.old)} times, not once"
        )
    return text.replace(plan.old, plan.new)


def fails(plan: Break) -> tuple[bool, str]:
    """(whether the law's test fails once the code is broken; why, or else the end of what pytest says)."""
    with tempfile.TemporaryDirectory(prefix="dpscale-law-") as place:
        for name in TREE:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(place) / name)
        path = Path(place) / "dpscale" / plan.file
        path.write_text(planted(path.read_text(), plan))
        file, name = plan.test.split("::")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}.py::{name}"]
        environment = {**os.environ, "PYTHONPATH": place}
        try:
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=MOST_SECONDS
            )
        except subprocess.TimeoutExpired:
            return False, f"no answer in {MOST_SECONDS} s"
    if done.returncode != 1:
        return False, done.stdout[-1500:] + done.stderr[-500:]
    said = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    return True, " ".join(part for part in said[:4] if part)[:160]


def main(rows: list[int]) -> int:
    """Break the laws of `rows` (all, where none is given), one after the other; 1 where a test did not notice."""
    missed = []
    for plan in BREAKS:
        if rows and plan.row not in rows:
            continue
        seen, said = fails(plan)
        law = TABLE[plan.row - 1].law
        sys.stdout.write(f"{plan.row:2} {'seen  ' if seen else 'MISSED'} {law}\n{said}\n")
        sys.stdout.flush()
        missed += [] if seen else [plan.row]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
