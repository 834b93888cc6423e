//! The conformance suite on a single Redis.

registry_tests::conformance!(registry_tests::harness::RedisHarness);
