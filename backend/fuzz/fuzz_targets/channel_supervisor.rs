#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::channel_supervisor::one_input(bytes));
