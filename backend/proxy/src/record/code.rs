//! The codes of refusals: stable words for programs. `backend/ERRORS.md` says what to do about
//! each.

/// Why a change was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Another change is under way.
    Busy,
    /// The device is about to end.
    Stopping,
    /// There is no standby to go back to, or to take over.
    NoStandby,
    /// A takeover comes first, and has not ended in time.
    Preempted,
    /// The instance that was replaced last still has requests.
    PreviousInUse,
    /// Workers were not given a CPU for too long.
    Starved,
    /// What was in flight did not end in time.
    DrainTimeout,
    /// The new domain cannot read the storage.
    SchemaNotAccepted,
    /// A parameter is unknown to the new domain.
    BadParameter,
    /// The new domain says that it cannot start.
    PrepareFailed,
    /// The new domain has panicked while it started.
    PreparePanicked,
    /// The two domains cannot serve side by side.
    SwapNotPossible,
    /// The guest would see another device.
    DeviceDiffers,
    /// It would be another disk.
    DifferentBacking,
    /// The new domain lacks what the guest was offered.
    FeatureMissing,
    /// The live domain says that it cannot write down what it has.
    QuiesceFailed,
    /// The live domain has panicked while it wrote down what it has.
    QuiescePanicked,
    /// The new domain says that it cannot take the storage up.
    ActivateFailed,
    /// The new domain has panicked while it took the storage up.
    ActivatePanicked,
    /// The dead domain cannot be ended, so that no other may serve what it had.
    NotFenced,
    /// The loader refused the module, with a code of its own.
    Module(&'static str),
}

impl Code {
    /// All of them but the loader's.
    pub const ALL: &[Self] = &[
        Self::Busy,
        Self::Stopping,
        Self::NoStandby,
        Self::Preempted,
        Self::PreviousInUse,
        Self::Starved,
        Self::DrainTimeout,
        Self::SchemaNotAccepted,
        Self::BadParameter,
        Self::PrepareFailed,
        Self::PreparePanicked,
        Self::SwapNotPossible,
        Self::DeviceDiffers,
        Self::DifferentBacking,
        Self::FeatureMissing,
        Self::QuiesceFailed,
        Self::QuiescePanicked,
        Self::ActivateFailed,
        Self::ActivatePanicked,
        Self::NotFenced,
    ];

    /// The word for it: `data.code` of an error reply. It does not change.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Stopping => "stopping",
            Self::NoStandby => "no_standby",
            Self::Preempted => "preempted",
            Self::PreviousInUse => "previous_in_use",
            Self::Starved => "starved",
            Self::DrainTimeout => "drain_timeout",
            Self::SchemaNotAccepted => "schema_not_accepted",
            Self::BadParameter => "bad_parameter",
            Self::PrepareFailed => "prepare_failed",
            Self::PreparePanicked => "prepare_panicked",
            Self::SwapNotPossible => "swap_not_possible",
            Self::DeviceDiffers => "device_differs",
            Self::DifferentBacking => "different_backing",
            Self::FeatureMissing => "feature_missing",
            Self::QuiesceFailed => "quiesce_failed",
            Self::QuiescePanicked => "quiesce_panicked",
            Self::ActivateFailed => "activate_failed",
            Self::ActivatePanicked => "activate_panicked",
            Self::NotFenced => "not_fenced",
            Self::Module(code) => code,
        }
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Where a code stands in the list. A code that is added has to be given a place here, and so
    /// in the list.
    fn place(code: Code) -> Option<usize> {
        Some(match code {
            Code::Busy => 0,
            Code::Stopping => 1,
            Code::NoStandby => 2,
            Code::Preempted => 3,
            Code::PreviousInUse => 4,
            Code::Starved => 5,
            Code::DrainTimeout => 6,
            Code::SchemaNotAccepted => 7,
            Code::BadParameter => 8,
            Code::PrepareFailed => 9,
            Code::PreparePanicked => 10,
            Code::SwapNotPossible => 11,
            Code::DeviceDiffers => 12,
            Code::DifferentBacking => 13,
            Code::FeatureMissing => 14,
            Code::QuiesceFailed => 15,
            Code::QuiescePanicked => 16,
            Code::ActivateFailed => 17,
            Code::ActivatePanicked => 18,
            Code::NotFenced => 19,
            Code::Module(_) => return None,
        })
    }

    #[test]
    fn every_code_is_listed_once_with_a_word_of_its_own() {
        let places: Vec<_> = Code::ALL.iter().map(|&code| place(code)).collect();
        assert_eq!(places, (0..places.len()).map(Some).collect::<Vec<_>>());
        assert_eq!(place(Code::NotFenced), Some(places.len() - 1), "the last one is listed");
        let words: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        let is_word = |word: &str| word.bytes().all(|b| b == b'_' || b.is_ascii_lowercase());
        assert!(words.iter().all(|word| is_word(word)));
        assert_eq!(Code::Module("module_x").to_string(), "module_x");
    }
}
