//! The sizes that a ring can have, which both sides refuse others by.

/// The largest size of a ring: as large as QEMU makes them.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What is said of a ring of `size` entries that is refused, where `largest` is the most: which
/// queue it is of, and what to do.
#[must_use]
pub fn ring_refusal(queue: usize, size: u32, largest: u16) -> String {
    let cure = cure(size, largest);
    format!("queue {queue} is refused: the frontend wants a ring of {size} entries, {cure}")
}

fn cure(size: u32, largest: u16) -> String {
    if !size.is_power_of_two() {
        let other = size.checked_next_power_of_two().unwrap_or(u32::MAX).min(u32::from(largest));
        return format!("which is no power of two: give QEMU queue-size={other}");
    }
    let qemu = format!("give QEMU queue-size={largest}");
    if size > u32::from(MAX_QUEUE_SIZE) {
        return format!("and {MAX_QUEUE_SIZE} is the most that there can be: {qemu}");
    }
    format!("and {largest} is the most: start the daemon with --queue-size {size}, or {qemu}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_size_is_answered_with_one_that_can_be_had() {
        let says = |size, largest| ring_refusal(0, size, largest);
        assert!(says(96, 128).contains("queue-size=128"));
        assert!(says(0, 128).contains("queue-size=1"));
        assert!(says(u32::MAX, 128).contains("queue-size=128"));
        assert!(says(256, 128).contains("--queue-size 256"));
        assert!(says(4096, 128).contains("is the most that there can be"));
    }
}
