//! For tests: images to test with, and the conformance suite of [`Catalog`](crate::Catalog).
