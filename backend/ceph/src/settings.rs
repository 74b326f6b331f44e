//! What is set in Ceph's client, whatever the configuration file says.
//!
//! Settings that an image has of its own, or that its pool has, go before it: with other values
//! than these an image is not used.

use std::ffi::CStr;

/// How long monitors are tried, in seconds.
pub(crate) const MONITOR_SECONDS: &str = "10";

/// What is set.
pub(crate) const SETTINGS: &[(&CStr, &str)] = &[
    (c"client_mount_timeout", MONITOR_SECONDS),
    // With it, an acknowledged write would be in this process, and gone with it.
    (c"rbd_cache", "false"),
    (c"rbd_persistent_cache_mode", "disabled"),
    // The guest may change a buffer that it has given away; what is sent is what is checksummed.
    (c"rbd_disable_zero_copy_writes", "true"),
    // A client whose lock is broken is locked out first: what it has under way is not written.
    (c"rbd_blocklist_on_break_lock", "true"),
    // Above these the caller would wait in the middle of a call. Guests have a bound of their own.
    (c"objecter_inflight_ops", "65536"),
    (c"objecter_inflight_op_bytes", "1073741824"),
];

/// Whether an image can be used for which these hold.
pub(crate) fn check(found: &[(String, String)], label: &str, pool: &str) -> Result<(), String> {
    for (name, value) in found {
        let ours = SETTINGS.iter().find(|(key, _)| key.to_bytes() == name.as_bytes());
        if let Some((_, ours)) = ours.filter(|(_, ours)| ours != value) {
            return Err(format!(
                "image {label}, or its pool, has {name}={value} set, and it must be {ours}, or what is acknowledged could be lost; remove it with `rbd config image rm {label} {name}` or `rbd config pool rm {pool} {name}`"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_be_otherwise_is_refused_with_what_to_do() {
        let found = |name: &str, value: &str| [(name.to_owned(), value.to_owned())];
        let check = |found: &[_]| check(found, "rbd/disk", "rbd");
        assert_eq!(check(&found("rbd_cache", "false")), Ok(()));
        assert_eq!(check(&found("rbd_cache_size", "1")), Ok(()), "nothing depends on it");
        for name in ["rbd_cache", "rbd_disable_zero_copy_writes", "rbd_blocklist_on_break_lock"] {
            let other = if name == "rbd_cache" { "true" } else { "false" };
            let why = check(&found(name, other)).unwrap_err();
            assert!(why.contains(&format!("rbd config image rm rbd/disk {name}")), "{why}");
        }
        assert!(check(&found("rbd_persistent_cache_mode", "rwl")).is_err());
    }
}
