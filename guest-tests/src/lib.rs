//! guest tests
