//! The conformance suite on a single Redis.

registry_tests::conformance!(registry_tests::harness::RedisHarness);
registry_tests::storm!(registry_tests::harness::RedisHarness);
