//! Groups of users, by name.

use std::path::Path;

/// Where groups are listed.
const GROUPS: &str = "/etc/group";

/// The number of a group, which is given by name or by number.
///
/// # Errors
/// There is no such group in `/etc/group`.
pub fn number_of(group: &str) -> Result<u32, String> {
    let groups = std::fs::read_to_string(Path::new(GROUPS)).unwrap_or_default();
    find(group, &groups).ok_or_else(|| {
        format!("--socket-group: there is no group `{group}` in {GROUPS}; give its number")
    })
}

fn find(group: &str, groups: &str) -> Option<u32> {
    if let Ok(number) = group.parse() {
        // What the kernel takes for no group at all.
        return Some(number).filter(|number| *number != u32::MAX);
    }
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name_and_by_number() {
        let groups = "root:x:0:\nkvm:x:104:libvirt-qemu\nbad:x:y:\n";
        assert_eq!(find("kvm", groups), Some(104));
        assert_eq!(find("root", groups), Some(0));
        assert_eq!(find("4000", groups), Some(4000));
        for none in ["", "x", "bad", "kv", "-1", "4294967295", "4294967296"] {
            assert_eq!(find(none, groups), None, "{none}");
        }
        assert!(number_of("no such group").unwrap_err().contains("give its number"));
    }
}
