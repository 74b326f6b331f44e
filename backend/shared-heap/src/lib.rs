//! shared-heap
