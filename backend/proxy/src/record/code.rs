//! The codes of refusals: stable words for programs. `backend/ERRORS.md` says what to do about
//! each.

/// Makes the enum, its list and its words from one table: no code is missing in one of them.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// Why a change was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])* $name,)*
            /// The loader refused the module, with a code of its own.
            Module(&'static str),
        }

        impl Code {
            /// All of them but the loader's.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word for it: `data.code` of an error reply. It does not change.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                    Self::Module(code) => code,
                }
            }
        }
    };
}

codes! {
    /// Another change is under way.
    Busy = "busy",
    /// The device is about to end.
    Stopping = "stopping",
    /// There is no standby to go back to, or to take over.
    NoStandby = "no_standby",
    /// A new generation is on trial.
    CanaryRuns = "canary_runs",
    /// A new generation could not be taken back.
    NoWayBack = "no_way_back",
    /// A new generation did not stand its trial.
    TakenBack = "taken_back",
    /// A new generation did not stand its trial, and serves on; or nothing does.
    NotTakenBack = "not_taken_back",
    /// A takeover comes first, and has not ended in time.
    Preempted = "preempted",
    /// The instance that was replaced last still has requests.
    PreviousInUse = "previous_in_use",
    /// Workers were not given a CPU for too long.
    Starved = "starved",
    /// What was in flight did not end in time.
    DrainTimeout = "drain_timeout",
    /// The new domain cannot read the storage.
    SchemaNotAccepted = "schema_not_accepted",
    /// A parameter is unknown to the new domain.
    BadParameter = "bad_parameter",
    /// The new domain says that it cannot start.
    PrepareFailed = "prepare_failed",
    /// The new domain has panicked while it started.
    PreparePanicked = "prepare_panicked",
    /// The two domains cannot serve side by side.
    SwapNotPossible = "swap_not_possible",
    /// The guest would see another device.
    DeviceDiffers = "device_differs",
    /// It would be another disk.
    DifferentBacking = "different_backing",
    /// The new domain lacks what the guest was offered.
    FeatureMissing = "feature_missing",
    /// The live domain says that it cannot write down what it has.
    QuiesceFailed = "quiesce_failed",
    /// The live domain has panicked while it wrote down what it has.
    QuiescePanicked = "quiesce_panicked",
    /// The new domain says that it cannot take the storage up.
    ActivateFailed = "activate_failed",
    /// The new domain has panicked while it took the storage up.
    ActivatePanicked = "activate_panicked",
    /// The disk would become smaller.
    ResizeShrinks = "resize_shrinks",
    /// The live domain says that the disk cannot be as large.
    ResizeFailed = "resize_failed",
    /// The live domain has panicked while it was resized.
    ResizePanicked = "resize_panicked",
    /// The dead domain cannot be ended, so that no other may serve what it had.
    NotFenced = "not_fenced",
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

    #[test]
    fn every_code_has_a_word_of_its_own() {
        let words: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        let is_word = |word: &str| word.bytes().all(|b| b == b'_' || b.is_ascii_lowercase());
        assert!(words.iter().all(|word| is_word(word)));
        assert_eq!(Code::Module("module_x").to_string(), "module_x");
    }
}
