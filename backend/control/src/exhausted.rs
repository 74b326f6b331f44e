//! What to do when the process has no descriptor left.

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::io;

/// An error, and what to do about it if descriptors have run out. By their numbers, because some
/// errors come as texts.
pub fn how_to_have_more(error: &io::Error) -> String {
    let text = error.to_string();
    let has = |errno: Errno| text.contains(&format!("(os error {})", errno.raw_os_error()));
    if has(Errno::MFILE) {
        let limit = getrlimit(Resource::Nofile)
            .current
            .map_or_else(String::new, |limit| format!(" {limit}"));
        format!(
            "{text}: the limit of open files{limit} is too low for so many queues and clients. Raise it (LimitNOFILE= in a systemd unit, ulimit -n in a shell), or start the daemon with fewer --queues"
        )
    } else if has(Errno::NFILE) {
        format!("{text}: the whole system has no descriptor left. Raise fs.file-max")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_descriptors_comes_with_its_cure() {
        let lack = io::Error::from(Errno::MFILE);
        for error in [io::Error::other(format!("cannot do it: {lack}")), lack] {
            let said = how_to_have_more(&error);
            assert!(
                said.contains("Too many open files") && said.contains("LimitNOFILE="),
                "{said}"
            );
        }
        assert!(how_to_have_more(&io::Error::from(Errno::NFILE)).contains("fs.file-max"));
        let other = io::Error::from(Errno::NOENT);
        assert_eq!(how_to_have_more(&other), other.to_string());
    }
}
