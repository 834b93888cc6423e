//! The conformance suite on a Redis Cluster.

registry_tests::conformance!(registry_tests::harness::RedisClusterHarness);
