#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::server_side::one_input(bytes));
