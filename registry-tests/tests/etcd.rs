//! The conformance suite on etcd.

registry_tests::conformance!(registry_tests::harness::EtcdHarness);
registry_tests::storm!(registry_tests::harness::EtcdHarness);
