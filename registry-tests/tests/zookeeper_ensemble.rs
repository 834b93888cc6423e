//! The conformance suite on a ZooKeeper ensemble.

registry_tests::conformance!(registry_tests::harness::ZooKeeperEnsembleHarness);
