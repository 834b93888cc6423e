//! The ZooKeeper backend of `service-registry`: not there yet.
//!
//! The crate holds its place in the workspace and has no public item. Follow the changelog for its arrival.
