//! The conformance suite on the memory backend.

registry_tests::conformance!(registry_tests::harness::MemoryHarness);
