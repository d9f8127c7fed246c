"""The laws of privacy in order: what can silently go wrong, how bad it is, and the tests that fail when it does.

Severity: C critical (the guarantee is broken), T theoretical (a formal gap), U utility.
"""

from __future__ import annotations

from typing import NamedTuple


class Law(NamedTuple):
    """`tests`: "file::function", the file relative to tests/ without .py."""

    row: int
    severity: str
    law: str
    tests: tuple[str, ...]


def _law(row: int, severity: str, law: str, *tests: str) -> Law:
    return Law(row, severity, law, tests)


RESUME, STEP, SESSION = "test_resume::test_", "test_step::test_", "test_session::test_"
SAMPLING, NOISE, SECRET = "test_sampling::test_", "test_noise::test_", "test_secret::test_"
CRASH, LEASE, RELEASE, CARD = "test_crash_points::test_", "test_lease::test_", "test_release::test_", "test_card::test_"
PLAN, USERS, LOOP, STREAMS = (
    "test_plan::test_",
    "test_data_users::test_",
    "test_loop::test_",
    "test_metrics_streams::test_",
)
ACCOUNTING, TRAIN, REFERENCE = "test_accounting::test_", "test_train::test_", "test_clipping_reference::test_"
CHECKPOINT, LEDGER, LAWS = "test_checkpoint::test_", "test_ledger::test_", "laws/"

TABLE = [
    _law(
        1, "C", "two runs of one config have different noise, and the secret is in its own file and nowhere else",
        RESUME + "two_runs_of_one_config_have_different_noise_and_their_secret_stays_in_its_file",
        SECRET + "two_runs_have_different_secrets_and_loading_gives_back_the_same",
        LEDGER + "the_ledger_holds_no_secret",
        RELEASE + "a_release_holds_no_leaf_but_the_weights_no_secret_and_nothing_of_the_runs_other_files",
    ),
    _law(
        2, "C", "keys are made of at least 64 bits: seeds that differ above 32 bits differ",
        LAWS + "test_02_key_bits::test_no_key_is_made_from_an_integer_of_32_bits",
        SECRET + "insecure_seeds_keep_all_their_bits_and_are_marked",
        "test_models::test_initial_weights_follow_all_64_bits_of_the_seed_alone",
        "test_transforms::test_example_keys_use_all_64_bits_of_the_index",
    ),
    _law(
        3, "C", "all derived keys are distinct, and noise of leaves, pairs and steps is uncorrelated",
        SECRET + "all_keys_over_steps_attempts_and_purposes_are_distinct",
        LOOP + "all_keys_over_steps_attempts_and_purposes_are_distinct",
        NOISE + "leaves_pairs_and_steps_are_uncorrelated_and_so_are_their_squares",
        NOISE + "consecutive_keys_share_no_value",
    ),
    _law(
        4, "T", "once the plan is fixed, divisor, noise, steps and programs are those of N and of N - 1",
        LAWS + "test_04_number_of_examples::test_with_one_record_less_a_fixed_plan_gives_the_same_numbers_and_programs",
        LAWS + "test_04_number_of_examples::test_a_run_never_plans_again_for_another_number_of_records",
        CARD + "where_the_number_of_records_is_private_nothing_on_the_card_gives_it_away",
    ),
    _law(
        5, "C", "sampling is in integers: exact sizes, exact rates, the same on every machine and version",
        SAMPLING + "size_table_equals_exact_rational_arithmetic_from_the_safe_side",
        SAMPLING + "every_subset_has_its_poisson_frequency",
        SAMPLING + "draws_equal_the_golden_draws",
        SAMPLING + "realised_rate_at_one_in_a_million_is_not_rounded",
    ),
    _law(
        6, "C", "inclusion is uncorrelated, also across the parts of different processes",
        SAMPLING + "inclusion_is_uncorrelated_within_and_across_shard_boundaries",
    ),
    _law(
        7, "C", "processes agree on parameters, draws and keys, or the run stops",
        "test_replicas::test_one_device_that_differs_is_seen",
        "test_replicas::test_a_difference_of_any_single_bit_is_seen",
        "test_replicas::test_a_process_with_another_draw_is_named",
        SAMPLING + "digest_is_keyed_and_names_one_draw",
        "test_distributed::test_processes_of_one_srun_meet_agree_and_fail_together",
    ),
    _law(
        8, "C", "stopped and resumed, a run has the draws and noise of one that was not",
        RESUME + "killed_at_a_few_moments_it_ends_as_if_nothing_had_happened",
        RESUME + "a_stop_reports_the_steps_that_ran_and_the_run_goes_on_to_the_same_end",
        "test_data_loader::test_starting_at_any_step_gives_the_rest",
    ),
    _law(
        9, "C", "the noise on the sum has the plan's variance on any number of devices and accumulations",
        "statistical/test_step_noise::test_the_variance_is_that_of_the_plan_and_not_one_percent_off",
        NOISE + "the_variance_is_sigma_squared_and_not_one_percent_off",
        STEP + "the_noise_is_the_same_on_any_mesh_to_the_last_bits",
    ),
    _law(
        10, "C", "noise is added to the sum: a planted unit gradient is what the output has more than the noise",
        STEP + "a_planted_unit_gradient_is_exactly_what_the_output_has_more_than_the_known_noise",
    ),
    _law(
        11, "C", "noise is drawn once in a logical step",
        STEP + "noise_is_drawn_once_per_logical_step_whatever_the_number_of_accumulations",
    ),
    _law(
        12, "C", "sums and noise are float32, whatever the model computes in",
        STEP + "sums_reduction_and_noise_are_float32_also_where_the_model_computes_in_bfloat16",
        STEP + "a_sum_of_257_ones_is_257_also_where_the_model_computes_in_bfloat16",
        NOISE + "the_program_holds_no_float_but_float32_and_values_are_many",
    ),
    _law(
        13, "T", "the noise has its tails, past nine standard deviations",
        NOISE + "the_tails_reach_past_nine_sigma_and_the_smallest_radius_is_not_zero",
        NOISE + "ten_million_draws_have_the_moments_and_the_distribution_of_a_normal",
    ),
    _law(
        14, "C", "every trainable leaf gets noise, and a tied leaf enters the norm once",
        STEP + "with_zero_gradients_every_trainable_leaf_moves_also_one_that_the_loss_never_uses",
        STEP + "a_tied_leaf_enters_the_norm_once",
    ),
    _law(
        15, "C", "the noise's size does not follow the realised batch",
        STEP + "the_noise_does_not_change_with_the_realised_batch_size",
    ),
    _law(
        16, "C", "noise words are ChaCha20 of the global index on any mesh, whole or in shards",
        NOISE + "words_equal_pure_python_chacha20_on_any_mesh",
        NOISE + "shards_get_the_noise_of_the_whole_vector",
        "test_shard_update::test_the_step_draws_the_words_of_pure_python_chacha20_in_both_modes",
    ),
    _law(
        17, "C", "a contribution is within the bound where ghost norms cancel, and for every sharding",
        "test_clipping_norms::test_contribution_stays_within_the_bound_where_ghost_norms_cancel",
        "test_clipping_norms::test_without_the_rounding_terms_the_same_examples_break_the_bound",
        "test_clipping_second_pass::test_no_example_gives_more_than_the_first_pass_measured",
        "test_clipping_second_pass::test_the_norm_that_factors_are_made_of_is_the_one_that_sums_keep_to",
        "test_clipping_hold::test_what_sums_are_made_of_is_made_once_wherever_it_comes_from",
        "test_clipping_fuzz::test_random_programs_stay_within_the_bound_and_forget_bad_rows",
        STEP + "no_example_moves_the_sum_by_more_than_the_bound_that_the_noise_is_made_for",
    ),
    _law(
        18, "C", "a row with NaN or inf leaves the bits of the batch without it, for every kind of layer",
        "test_clipping_split::test_bad_rows_and_padding_leave_the_bits_of_the_others",
        REFERENCE + "grouped_convolution_does_not_carry_nan_to_other_rows",
        REFERENCE + "batches_without_any_good_row_give_zero",
    ),
    _law(
        19, "C", "what padding holds changes no bit",
        STEP + "padding_and_bad_rows_leave_the_same_bits_as_rows_that_are_not_there",
        REFERENCE + "bad_rows_and_padding_give_the_bits_of_the_batch_without_them",
    ),
    _law(
        20, "C", "an empty draw is a step like any other, on one process and on all",
        STEP + "an_empty_draw_is_a_step_noised_counted_and_moving_every_parameter",
        LOOP + "an_empty_first_draw_and_any_later_one_compile_nothing_after_the_start",
        "test_batching::test_an_empty_draw_has_no_accumulation_and_an_empty_process_no_rows",
    ),
    _law(
        21, "C", "a batch over what was planned loses no row; a cap is accounted as one",
        "test_batching::test_draws_larger_than_planned_lose_no_row",
        "test_data_loader::test_draws_larger_than_planned_are_loaded_whole_and_empty_ones_are_steps",
        PLAN + "truncation_is_accounted_as_truncation",
    ),
    _law(
        22, "C", "the divisor is the public expected batch size",
        STEP + "the_divisor_is_the_public_expected_batch_size_never_the_realised_one",
    ),
    _law(
        23, "C", "no example's gradient depends on another example; BatchNorm is refused",
        "test_models::test_an_examples_gradient_does_not_change_when_the_others_do",
        "test_models::test_batch_norm_is_refused_with_a_message_that_names_group_norm",
        TRAIN + "a_model_with_batch_norm_is_refused_with_the_name_of_the_remedy",
    ),
    _law(
        24, "C", "all views of one example together move the sum by the clip norm at most, and mix with no other's",
        "test_data_augmentation::test_all_views_of_one_example_move_the_sum_by_at_most_the_clip_norm",
        "test_data_augmentation::test_views_never_reach_another_example",
    ),
    _law(
        25, "U", "weight decay does not eat the clip norm",
        "test_optimizer::test_weight_decay_is_decoupled_from_the_gradient",
        "test_optimizer::test_weight_decay_takes_no_share_of_the_clip_norm",
    ),
    _law(
        26, "C", "optimizer, average and schedule are fed with noised values only",
        STEP + "statistics_and_requests_never_touch_the_state",
        "test_shard_update::test_the_average_is_the_recursion_over_the_noised_parameters_with_its_warm_up",
        "test_optimizer::test_the_schedule_follows_the_step_that_the_optimizer_counts",
    ),
    _law(
        27, "C", "noise keys of all attempts are disjoint",
        SESSION + "no_key_is_used_twice_and_no_seen_step_is_uncharged",
        SESSION + "copies_of_one_directory_share_no_key_even_before_the_first_step",
        SECRET + "all_keys_over_steps_attempts_and_purposes_are_distinct",
    ),
    _law(
        28, "C", "no noise is used with another batch, start, learning rate, loss or data",
        SESSION + "a_change_is_refused_with_the_difference_and_changes_nothing",
        SESSION + "a_new_attempt_is_charged_on_top_with_other_keys_for_batch_and_noise",
        "test_program::test_what_changes_an_update_is_shown",
        "test_program::test_the_last_bit_of_a_constant_anywhere_in_the_loss_is_seen",
        RESUME + "two_processes_then_one_then_two_end_as_one",
    ),
    _law(
        29, "C", "a new attempt has fresh batches and fresh noise, and is charged on top",
        RESUME + "falling_back_is_charged_on_top_with_fresh_batches_and_noise",
        RESUME + "an_allowed_epsilon_is_never_passed_by_falling_back_and_a_reserve_keeps_the_length",
        LEDGER + "charges_are_the_sum_over_attempts",
    ),
    _law(
        30, "C", "a crash between any two writes never charges too little and loses nothing",
        CRASH + "every_call_that_changes_a_file_of_a_run_is_a_fault_point",
        CRASH + "dying_before_a_write_loses_nothing_and_charges_no_less_than_was_drawn",
        CRASH + "a_checkpoint_that_is_durable_late_lowers_no_charge_of_what_was_begun_meanwhile",
        CRASH + "a_ledger_line_that_was_half_written_is_as_good_as_none",
        CRASH + "a_real_sigkill_of_one_or_two_processes_loses_nothing_either",
    ),
    _law(
        31, "C", "one run at a time in a directory",
        LEASE + "a_second_run_is_refused_and_told_who_holds_it",
        LEASE + "who_yields_to_whom",
        LEASE + "a_requeued_job_takes_over_from_itself",
        LEASE + "a_run_that_lost_its_lease_ends_and_leaves_the_others_alone",
    ),
    _law(
        32, "C", "the plan of a run does not change on resume",
        SESSION + "a_change_is_refused_with_the_difference_and_changes_nothing",
        SESSION + "a_new_attempt_does_not_excuse_another_plan_or_other_data",
        RESUME + "a_finished_run_called_again_does_nothing_and_says_the_same",
    ),
    _law(
        33, "C", "of damaged checkpoints the run falls back aloud, and never starts afresh in silence",
        CHECKPOINT + "a_bad_checkpoint_is_set_aside_with_a_word_and_the_one_before_is_used",
        CHECKPOINT + "no_fresh_start_when_none_is_whole",
        SESSION + "no_fresh_start_in_silence_when_every_checkpoint_is_gone",
    ),
    _law(
        34, "C", "public logs hold listed names only and are equal for neighbouring data sets",
        LAWS + "test_34_public_logs::test_what_runs_on_neighbouring_data_sets_make_public_is_equal",
        STREAMS + "a_key_that_is_not_on_the_whitelist_never_gets_into_the_public_stream",
        STREAMS + "the_sensitive_stream_is_off_by_default_and_then_leaves_no_trace",
        "test_metrics_progress::test_a_log_says_nothing_that_follows_step_times_unless_asked",
        TRAIN + "private_held_out_metrics_stay_sensitive",
    ),
    _law(
        35, "C", "a release holds the weights and no secret, key or optimizer state",
        RELEASE + "a_release_holds_no_leaf_but_the_weights_no_secret_and_nothing_of_the_runs_other_files",
        RELEASE + "the_scan_finds_what_is_planted",
    ),
    _law(
        36, "T", "in constant time every step takes as many accumulations, and the result is the same",
        TRAIN + "in_constant_time_every_step_takes_as_many_accumulations_and_the_result_is_the_same",
        PLAN + "a_constant_number_of_accumulations_needs_a_cap_and_the_refusal_names_one_that_is_nearly_free",
    ),
    _law(
        37, "C", "preprocessing holds constants: one record changes no other record's features",
        "test_transforms::test_changing_one_record_changes_no_other_records_features",
        "test_data_sources::test_the_number_of_classes_is_never_counted_from_the_labels",
    ),
    _law(
        38, "C", "the unit of privacy is in the plan and on the card, users with their bound",
        USERS + "the_plan_samples_users_and_states_unit_and_bound_and_epsilon_is_that_of_users",
        USERS + "a_half_stated_unit_is_refused",
        CARD + "the_unit_of_privacy_is_printed_and_so_is_what_several_records_of_one_person_mean",
        CARD + "user_level_privacy_is_printed_with_its_bound",
    ),
    _law(
        39, "C", "no record is read twice so that shares come out even",
        "test_batching::test_all_processes_together_load_exactly_the_draw",
        "test_data_loader::test_the_multiset_of_loaded_ids_over_processes_is_the_draw",
    ),
    _law(
        40, "C", "public data and the hyper-parameter search must be stated",
        RELEASE + "what_only_the_owner_knows_must_be_stated",
        CARD + "public_data_and_the_search_are_printed_as_the_owner_stated_them",
    ),
    _law(
        41, "C", "epsilon does not follow the physical batch, the accumulation or the number of devices",
        PLAN + "epsilon_is_the_same_for_any_physical_batch",
        TRAIN + "nothing_under_performance_changes_the_result",
        LOOP + "physical_batch_devices_and_residence_change_no_index_no_noise_and_no_result",
    ),
    _law(
        42, "C", "epsilon is that of the steps that were charged",
        RESUME + "a_stop_reports_the_steps_that_ran_and_the_run_goes_on_to_the_same_end",
        PLAN + "calibration_keeps_within_epsilon_and_epsilon_follows_the_steps_that_ran",
        CARD + "a_run_that_was_stopped_gets_the_planned_ends_epsilon_and_the_other_is_labelled",
    ),
    _law(
        43, "C", "calibration keeps to the target, as other accountants confirm",
        ACCOUNTING + "calibration_never_overshoots_and_wastes_at_most_1e_4_of_the_noise",
        ACCOUNTING + "at_the_quickstart_pld_spends_3_where_rdp_spends_3_27",
        ACCOUNTING + "one_step_is_the_hockey_stick_divergence_integrated_by_hand",
        CARD + "epsilon_is_never_rounded_down",
    ),
    _law(
        44, "C", "the rate that is accounted is the rate that is sampled",
        LAWS + "test_34_public_logs::test_the_run_samples_with_the_very_numbers_that_it_accounts",
        SAMPLING + "the_rate_to_account_with_is_never_below_the_sampled_rate",
    ),
    _law(
        45, "C", "the neighbouring relation decides sensitivity and accountant together",
        PLAN + "the_replace_one_factor_is_in_the_accountant_and_not_in_the_noise_as_well",
        "test_sensitivity::test_one_record_moves_the_sum_by_at_most_the_sensitivity_and_some_record_by_nearly_that",
        "test_sensitivity::test_the_noise_unit_knows_no_relation_because_the_accountant_has_the_factor_2",
    ),
    _law(
        46, "C", "clip, reduce, noise, divide, optimizer: in this order",
        STEP + "clip_then_reduce_then_noise_then_divide_then_optimizer",
        STEP + "finalize_has_exactly_one_reduction_of_parameters_and_statistics_and_accumulate_has_none",
    ),
    _law(
        47, "C", "truncation takes a uniform subset, and only accountants that know it are asked",
        SAMPLING + "truncation_keeps_a_fresh_uniform_subset",
        SAMPLING + "truncated_draws_include_every_index_equally_often",
        PLAN + "bad_values_are_refused_before_anything_runs",
    ),
    _law(
        48, "C", "keys and data are arguments of the compiled programs, never part of them",
        STEP + "keys_and_data_are_arguments_and_never_in_the_program",
        NOISE + "the_key_is_not_in_the_program",
        LAWS + "test_48_programs::test_no_program_that_a_run_compiles_holds_a_key_or_a_record",
    ),
    _law(
        49, "C", "a retry of an uncommitted step has the same draw",
        CRASH + "dying_before_a_write_loses_nothing_and_charges_no_less_than_was_drawn",
        RESUME + "killed_at_a_few_moments_it_ends_as_if_nothing_had_happened",
        LOOP + "noise_keys_follow_the_step_not_the_place_in_the_loop",
    ),
    _law(
        50, "C", "the secret can be destroyed after the last release, and the card says whether it was",
        RELEASE + "destroying_the_secret_ends_the_run_for_good",
        RELEASE + "killed_while_the_secret_was_destroyed_it_is_finished_the_next_time",
        CARD + "the_card_says_whether_the_secret_was_destroyed",
    ),
    _law(
        51, "C", "a user's records are summed before the norm, and chosen from that user's data only",
        USERS + "a_users_records_are_summed_before_the_norm_so_one_user_moves_the_sum_by_the_clip_norm_at_most",
        USERS + "which_records_of_a_user_are_used_does_not_change_with_other_users_data",
    ),
]  # fmt: skip
