//! srcu
