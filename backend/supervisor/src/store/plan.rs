//! What is said to the manager, and in which order, so that the store has another vault.

use super::name::Name;
use super::record::{Identity, Object, Record};
use super::{Held, Message, Step, Store};
use crate::descriptor::Descriptor;
use std::collections::BTreeSet;
use std::io;

/// Why a vault is not what is in the store.
#[derive(Debug)]
pub(super) enum Unkept {
    /// It cannot be: there is no room.
    DoesNotFit(String),
    /// It could not be this time; what is there is let be.
    NotNow(io::Error),
}

impl From<io::Error> for Unkept {
    fn from(error: io::Error) -> Self {
        Self::NotNow(error)
    }
}

impl Store {
    /// Plans to have what `record` says, less its objects, which are these `descriptors` in its
    /// order: new objects, the record, and then what is not referred to any more goes.
    ///
    /// An object that is there under some name stays under it: the manager drops the same open
    /// file without a word when it comes under another one.
    pub(super) fn plan(
        &mut self,
        mut record: Record,
        descriptors: Vec<Descriptor>,
    ) -> Result<(), Unkept> {
        let mut new: Vec<(Name, Identity, Descriptor)> = Vec::new();
        let mut referred = BTreeSet::new();
        let mut numbers = self.numbers;
        for (kept, descriptor) in record.list.objects().into_iter().zip(descriptors) {
            let file = Identity::of(&descriptor)?;
            let stays = |held: &Held| held.step != Step::Going && held.file.is_same_file(&file);
            let known = self.held.iter().find(|(_, held)| stays(held)).map(|(name, _)| *name);
            let also = new.iter().find(|(_, other, _)| other.is_same_file(&file));
            let name = known.or(also.map(|(name, ..)| *name)).unwrap_or_else(|| {
                numbers += 1;
                Name::Object(numbers)
            });
            if known.is_none() && also.is_none() {
                new.push((name, file, descriptor));
            }
            referred.insert(name);
            record.objects.insert(kept, Object { name: name.to_string(), file });
        }
        if self.said.as_ref() == Some(&record) {
            return Ok(());
        }
        let limit = self.limit.unwrap_or(usize::MAX);
        let needed = referred.len() + 1;
        if needed > limit {
            return Err(Unkept::DoesNotFit(format!(
                "it takes {needed} entries, and the store has room for {limit}; raise \
                 FileDescriptorStoreMax= of the unit"
            )));
        }
        let written = record.write()?;
        let file = Identity::of(&written)?;
        numbers += 1;
        self.numbers = numbers;
        let leaving = self.held.keys().copied().filter(|name| !referred.contains(name));
        let leaving: Vec<Name> = leaving.collect();
        // The next one that comes is to find the one before; where there is no room for both, it
        // finds none for a moment.
        let is_tight = self.held.len() + new.len() + 1 > limit;
        if is_tight {
            self.remove(leaving.iter().copied());
        }
        new.push((Name::Record(numbers), file, Descriptor::from(written)));
        for (name, file, descriptor) in new {
            self.held.insert(name, Held { file, step: Step::Coming });
            self.queue.push_back(Message::Put(name, descriptor));
        }
        self.remove(leaving);
        self.wants_barrier = true;
        self.said = Some(record);
        Ok(())
    }
}
