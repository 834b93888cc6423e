//! The conformance suite on Redis under Sentinels.

registry_tests::conformance!(registry_tests::harness::RedisSentinelHarness);
