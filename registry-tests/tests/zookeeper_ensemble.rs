//! The conformance suite on a ZooKeeper ensemble, and what happens to clusters.

registry_tests::conformance!(registry_tests::harness::ZooKeeperEnsembleHarness);
registry_tests::clusters!(registry_tests::harness::ZooKeeperEnsembleHarness);
