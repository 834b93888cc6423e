//! The conformance suite on an etcd cluster, and what happens to clusters.

registry_tests::conformance!(registry_tests::harness::EtcdClusterHarness);
registry_tests::clusters!(registry_tests::harness::EtcdClusterHarness);
