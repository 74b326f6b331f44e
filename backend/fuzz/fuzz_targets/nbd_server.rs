#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::nbd_server::one_input(bytes));
