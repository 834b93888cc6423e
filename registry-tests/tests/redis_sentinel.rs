//! The conformance suite on Redis under Sentinels, and what happens to clusters.

registry_tests::conformance!(registry_tests::harness::RedisSentinelHarness);
registry_tests::clusters!(registry_tests::harness::RedisSentinelHarness);
