//! The conformance suite on a Redis Cluster, and what happens to clusters.

registry_tests::conformance!(registry_tests::harness::RedisClusterHarness);
registry_tests::clusters!(registry_tests::harness::RedisClusterHarness);
