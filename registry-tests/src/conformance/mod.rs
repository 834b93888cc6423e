//! The conformance suite: what the library promises, as cases that any backend can run.
//!
//! Each case is a sentence and a function over a [`Harness`](crate::harness::Harness). [`conformance!`](crate::conformance!)
//! makes a test of each, and every backend runs every case: how stores differ is data of the harness.
//!
//! # Examples
//! ```no_run
//! # // tests/memory.rs
//! registry_tests::conformance!(registry_tests::harness::MemoryHarness);
//! # fn main() {}
//! ```
//! `tests/toy.rs` of this crate is a whole backend of a third party, from nothing, with its harness.
//!
//! The cases mostly wait, so let many of them run at once: `cargo test -- --test-threads=16`. A case that fails shows
//! what the library logged; `RUST_LOG=registry_core=debug` shows more.

#![allow(clippy::unwrap_used, reason = "these are tests, in a library")]

pub mod calls;
pub mod discovery;
pub mod leaks;
pub mod liveness;
pub mod operating;
pub mod outage;
pub mod protection;
pub mod registration;
pub mod support;

use std::{future::Future, sync::Once, time::Duration};

use tracing_subscriber::EnvFilter;

/// No case takes longer, unless something hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs one case on a runtime of its own.
///
/// # Panics
/// If the case does, or does not end.
pub fn run(case: impl Future<Output = ()>) {
    run_within(LIMIT, case);
}

/// [`run`] for a case that lasts longer than others.
///
/// # Panics
/// If the case does, or does not end in time.
pub fn run_within(limit: Duration, case: impl Future<Output = ()>) {
    static LOG: Once = Once::new();
    LOG.call_once(|| {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
        // Someone else may have set one up already.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    });
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().expect("a runtime");
    let outcome = runtime.block_on(async { tokio::time::timeout(limit, case).await });
    runtime.shutdown_timeout(Duration::from_secs(5));
    assert!(outcome.is_ok(), "the case did not end within {limit:?}");
}

/// Makes a test of every case of the suite, for the backend that a [`Harness`](crate::harness::Harness) stands for.
///
/// See the [module](mod@crate::conformance).
#[macro_export]
macro_rules! conformance {
    ($harness:ty) => {
        $crate::__each_case! { $harness;
            registration {
                a_heartbeat_reports_what_it_renewed_and_what_it_restored
                a_listener_on_every_address_is_called_at_the_one_that_is_registered
                a_refused_update_leaves_the_previous_content_in_force
                a_registered_instance_is_discovered_elsewhere
                a_thousand_instances_come_and_go
                an_address_that_nobody_can_call_is_refused_and_can_be_read
                an_update_is_one_change_and_keeps_registered_at
                bad_names_are_refused_at_once
                draining_is_an_update_that_readers_see
                hostile_names_come_back_as_they_were
                methods_of_services_come_in_batches_and_are_followed_one_by_one
                one_bad_record_in_a_batch_stops_no_other
                registering_again_changes_nothing
                registrations_show_each_key_and_its_state
                unknown_fields_survive_a_read_modify_write
                unregister_never_touches_what_others_registered
                unregister_says_whether_it_was_ours
                what_left_can_come_back
            }
            discovery {
                a_newer_record_is_read_as_far_as_it_is_understood
                a_reader_may_come_before_everyone_else
                a_service_never_sees_one_whose_name_begins_like_its_own
                a_slow_reader_reaches_the_latest_state
                an_idle_service_is_dropped_and_can_be_followed_again
                an_operators_override_is_merged_and_lifted
                an_unknown_service_is_empty_and_live
                announced_readers_are_listed_as_subscribers
                available_leaves_out_the_drained_and_the_not_up
                bad_records_never_hide_the_good_ones
                changes_come_with_before_and_after
                no_change_is_lost_between_the_list_and_the_watch
                services_lists_every_service_with_an_instance
                the_first_item_of_a_watcher_is_the_complete_set
                who_waits_for_instances_gets_them_once_they_are_there
                who_waits_in_vain_is_told_what_is_missing
            }
            liveness {
                a_crashed_process_is_gone_within_its_bound
                a_deleted_record_is_restored
                a_deleted_service_is_restored
                a_destroyed_registry_is_closed
                a_dropped_registry_ends_its_tasks_and_expires
                a_mass_restore_is_spread_at_its_rate
                a_late_stop_never_takes_out_the_successor
                a_restarted_process_takes_its_key_over_at_once
                destroy_leaves_nothing_behind
                one_bad_registration_stops_no_other_from_coming_back
                two_live_owners_do_not_fight
                unregister_wins_over_heartbeats
                unregister_wins_over_puts_in_flight
                what_a_lost_session_held_is_restored
                what_is_restored_is_the_latest_content
                whoever_registers_last_has_the_key
            }
            calls {
                a_rolling_restart_costs_no_call
            }
            operating {
                a_bad_override_is_refused_at_once
                a_drained_instance_stays_visible_and_takes_no_new_traffic
                a_gated_instance_takes_traffic_only_while_it_is_well
                a_starting_instance_takes_traffic_once_it_is_up
                an_override_is_seen_by_every_reader_and_listed
                an_override_may_come_before_its_instance
                an_override_outlives_its_operator_and_is_anybodys
                an_override_sets_only_what_it_names
                an_override_stays_in_force_when_its_instance_registers_again
                only_what_is_registered_here_can_be_changed
                status_and_weight_that_are_set_together_are_both_in_force
            }
            leaks {
                a_registry_outlives_its_runtime
                instances_that_come_and_go_leave_nothing_behind
                registries_that_come_and_go_leave_nothing_behind
                watchers_that_come_and_go_leave_nothing_behind
            }
            outage {
                a_black_hole_is_found_out_within_a_ttl
                a_client_in_a_black_hole_comes_back
                a_client_may_start_before_its_store
                a_dead_server_is_not_hammered
                a_frozen_server_never_empties_a_reader
                a_long_outage_ends_in_restored_registrations
                a_process_starts_and_serves_with_the_store_down
                a_process_starts_and_serves_with_the_store_silent
                a_quiet_service_outlives_what_is_forgotten_beside_it
                a_restarted_server_is_no_loss
                a_short_cut_changes_nothing
                a_wiped_store_is_filled_again_and_readers_never_notice
                an_outage_keeps_the_last_set_marked_stale
                an_outage_of_one_is_no_outage_of_others
                changes_during_a_cut_are_seen_after_a_compaction
                changes_during_a_cut_are_seen_after_it
                destroy_with_a_dead_server_ends_by_its_deadline
                destroy_with_a_silent_server_ends_by_its_deadline
                events_tell_what_happens
                every_call_has_a_deadline
                register_in_an_outage_is_made_good_after_it
                unregister_in_an_outage_wins
                what_arrives_after_its_removal_is_taken_out_again
                what_arrives_late_is_taken_out_again
                what_is_on_disk_yields_at_once_to_what_the_store_has
            }
            protection {
                a_session_that_ends_is_one_change
                few_that_vanish_are_believed
                many_that_come_back_in_time_were_never_away
                many_that_leave_are_believed_at_once
                many_that_leave_during_a_cut_are_believed_after_it
                many_that_vanish_are_held_until_the_bound_is_over
                the_last_instance_that_leaves_is_believed_at_once
                what_a_wiped_store_lost_is_held_and_then_believed
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __each_case {
    ($harness:ty; $($topic:ident { $($case:ident)* })*) => {
        $(mod $topic {
            #[allow(unused_imports, reason = "the harness may be named from here or from the root")]
            use super::*;

            $(#[test]
            fn $case() {
                $crate::conformance::run($crate::conformance::$topic::$case::<$harness>());
            })*
        })*
    };
}

#[cfg(test)]
mod tests {
    /// A case that is not in the list would never run, and nobody would notice.
    #[test]
    fn every_case_is_in_the_list() {
        let list = include_str!("mod.rs");
        let topics = [
            include_str!("registration.rs"),
            include_str!("calls.rs"),
            include_str!("discovery.rs"),
            include_str!("leaks.rs"),
            include_str!("liveness.rs"),
            include_str!("operating.rs"),
            include_str!("outage.rs"),
            include_str!("protection.rs"),
        ];
        let cases = topics.iter().flat_map(|topic| topic.lines()).filter_map(|line| {
            let (name, bounds) = line.strip_prefix("pub async fn ")?.split_once('<')?;
            bounds.starts_with("H: Harness>()").then_some(name)
        });
        let cases: Vec<_> = cases.collect();
        assert!(cases.len() >= 45, "{}", cases.len());
        for case in cases {
            assert!(list.lines().any(|line| line.trim() == case), "{case} is not in the list");
        }
    }
}
