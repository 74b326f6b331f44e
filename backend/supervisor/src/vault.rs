//! What must outlive a server, as the last one has said it.

use crate::descriptor::Descriptor;
use channel::Kept;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// The list, and what it refers to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Vault {
    list: Option<channel::Vault>,
    objects: BTreeMap<Kept, Descriptor>,
    /// There is no live module, because no server has lived with it; one that an upgrade brings is
    /// waited for.
    #[serde(default)]
    awaits_upgrade: bool,
}

impl Vault {
    /// One that was kept elsewhere, and whether it waited for an upgrade there.
    ///
    /// # Errors
    /// The list refers to something that is not among the objects.
    pub fn restored(
        list: channel::Vault,
        objects: BTreeMap<Kept, Descriptor>,
        awaits_upgrade: bool,
    ) -> Result<Self, String> {
        match list.objects().iter().find(|object| !objects.contains_key(object)) {
            Some(missing) => Err(format!("object {missing} is not there")),
            None => Ok(Self { list: Some(list), objects, awaits_upgrade }),
        }
    }

    /// What there is, if a server has said so.
    #[must_use]
    pub const fn list(&self) -> Option<&channel::Vault> {
        self.list.as_ref()
    }

    /// Takes a new list, and the objects that come with it. What it does not refer to is let go.
    ///
    /// # Errors
    /// It refers to something that never came; what was there before stays.
    pub fn take(
        &mut self,
        list: channel::Vault,
        new: &[Kept],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if new.len() != descriptors.len() {
            return Err(format!("{} objects with {} descriptors", new.len(), descriptors.len()));
        }
        let mut objects = self.objects.clone();
        objects.extend(new.iter().copied().zip(descriptors.into_iter().map(Descriptor::from)));
        let referred = list.objects();
        if let Some(missing) = referred.iter().find(|object| !objects.contains_key(object)) {
            return Err(format!("object {missing} never came"));
        }
        objects.retain(|object, _| referred.contains(object));
        self.awaits_upgrade &= list.live.is_none();
        (self.list, self.objects) = (Some(list), objects);
        Ok(())
    }

    /// The list for another server, and its objects' descriptors in its order.
    #[must_use]
    pub fn give(&self) -> Option<(channel::Vault, Vec<Descriptor>)> {
        let list = self.list.clone()?;
        let objects =
            list.objects().iter().map(|object| self.objects.get(object).cloned()).collect();
        Some((list, Option::unwrap_or_default(objects)))
    }

    /// The next server has no live module, for this reason.
    pub fn drop_live(&mut self, why: &str) {
        if let Some(list) = &mut self.list {
            (list.live, list.standby, list.fault) = (None, None, Some(why.to_owned()));
            self.awaits_upgrade = true;
        }
    }

    /// Whether nothing is to be served before an upgrade has brought a live module.
    #[must_use]
    pub const fn awaits_upgrade(&self) -> bool {
        self.awaits_upgrade
    }

    /// Whether there is another module than the live one.
    #[must_use]
    pub fn has_standby(&self) -> bool {
        self.list.as_ref().is_some_and(|list| list.standby.is_some())
    }

    /// The hash of the live module's bytes.
    #[must_use]
    pub fn live(&self) -> Option<&str> {
        Some(&self.list.as_ref()?.live.as_ref()?.sha256)
    }

    /// The standby's module is the live one from now on. Returns its name.
    pub fn fall_back(&mut self) -> Option<String> {
        let list = self.list.as_mut()?;
        let standby = list.standby.take()?;
        list.generation += 1;
        list.fault = None;
        let name = standby.name.clone();
        list.live = Some(standby);
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use channel::{Module, Region};

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    fn module(name: &str, image: Kept) -> Module {
        Module {
            name: name.to_owned(),
            version: "1".to_owned(),
            path: name.into(),
            sha256: name.to_owned(),
            signature: None,
            params: BTreeMap::new(),
            image,
        }
    }

    fn list(live: Kept, memfd: Kept) -> channel::Vault {
        let region = Region { key: "disk".to_owned(), len: 1, memfd };
        channel::Vault {
            live: Some(module("live", live)),
            regions: vec![region],
            ..channel::Vault::default()
        }
    }

    #[test]
    fn what_is_not_referred_to_any_more_is_let_go() {
        let mut vault = Vault::default();
        vault.take(list(1, 2), &[1, 2], vec![file(), file()]).unwrap();
        vault.take(list(3, 2), &[3], vec![file()]).unwrap();
        assert_eq!(vault.objects.keys().collect::<Vec<_>>(), [&2, &3]);
        let (given, descriptors) = vault.give().unwrap();
        assert_eq!(given, list(3, 2));
        assert_eq!(descriptors, [vault.objects[&3].clone(), vault.objects[&2].clone()]);
    }

    #[test]
    fn a_list_with_something_that_never_came_changes_nothing() {
        let mut vault = Vault::default();
        vault.take(list(1, 2), &[1, 2], vec![file(), file()]).unwrap();
        assert!(vault.take(list(1, 9), &[], Vec::new()).is_err());
        assert!(vault.take(list(1, 9), &[9], Vec::new()).is_err());
        assert_eq!(vault.list(), Some(&list(1, 2)));
    }

    #[test]
    fn the_standby_goes_on_once() {
        let mut vault = Vault::default();
        let standby = Some(module("standby", 3));
        let all = channel::Vault { standby, ..list(1, 2) };
        vault.take(all, &[1, 2, 3], vec![file(), file(), file()]).unwrap();
        assert!(vault.has_standby());
        assert_eq!(vault.fall_back().as_deref(), Some("standby"));
        assert_eq!(vault.live(), Some("standby"));
        assert_eq!(vault.fall_back(), None);
        assert_eq!(vault.give().unwrap().1.len(), 2);
    }
}
