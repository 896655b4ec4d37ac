//! All integration tests in one binary, so that libtorch is linked once.
