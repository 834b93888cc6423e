//! The conformance suite on a ZooKeeper.

registry_tests::conformance!(registry_tests::harness::ZooKeeperHarness);
registry_tests::storm!(registry_tests::harness::ZooKeeperHarness);
