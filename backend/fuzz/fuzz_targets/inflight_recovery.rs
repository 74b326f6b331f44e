#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::inflight_recovery::one_input(bytes));
