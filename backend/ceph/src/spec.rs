//! Which image is meant, and how it is reached: what the domain passes on of its parameters.

use domain_abi::{DomainError, Params};

/// An image, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) pool: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) snapshot: Option<String>,
    /// The configuration file; where Ceph looks for it, if it is empty.
    pub(crate) conf: String,
    /// The user, without `client.`.
    pub(crate) id: String,
    pub(crate) read_only: bool,
}

impl Spec {
    pub(crate) fn parse(params: &Params) -> Result<Self, DomainError> {
        let text = |key: &str| params.get(key).unwrap_or("").to_owned();
        let image = text("image");
        let wrong = |why: &str| {
            Err(DomainError::new(format!(
                "parameter `image` is `{image}`; {why}: write image=POOL/NAME, or image=POOL/NAME@SNAP for a snapshot"
            )))
        };
        let Some((pool, name)) = image.split_once('/') else { return wrong("the pool is missing") };
        let (name, snapshot) = match name.split_once('@') {
            Some((name, snapshot)) => (name, Some(snapshot.to_owned())),
            None => (name, None),
        };
        if pool.is_empty() || name.is_empty() || snapshot.as_ref().is_some_and(String::is_empty) {
            return wrong("a part of it is empty");
        }
        if name.contains('/') {
            return wrong("it has two `/` (a namespace is given with namespace=NAME)");
        }
        for key in ["image", "conf", "id", "namespace"] {
            if params.get(key).is_some_and(|value| value.contains(char::is_control)) {
                let why = format!("parameter `{key}` has control characters in it; leave them out");
                return Err(DomainError::new(why));
            }
        }
        if text("id").starts_with("client.") {
            return Err(DomainError::new(format!(
                "parameter `id` is `{0}`; it is the user without `client.`: write id={1}",
                text("id"),
                &text("id")["client.".len()..]
            )));
        }
        Ok(Self {
            pool: pool.to_owned(),
            namespace: text("namespace"),
            name: name.to_owned(),
            read_only: snapshot.is_some() || params.flag("readonly", false)?,
            snapshot,
            conf: text("conf"),
            id: params.get("id").filter(|id| !id.is_empty()).unwrap_or("admin").to_owned(),
        })
    }

    /// For people.
    pub(crate) fn label(&self) -> String {
        let Self { pool, namespace, name, .. } = self;
        let snapshot = self.snapshot.iter().map(|name| format!("@{name}")).collect::<String>();
        let namespace = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        format!("{pool}/{namespace}{name}{snapshot}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[&str]) -> Result<Spec, String> {
        let params = Params::from_pairs(pairs).unwrap();
        Spec::parse(&params).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_is_named_by_pool_name_and_snapshot() {
        let spec = parse(&["image=rbd/disk@monday", "namespace=team", "id=vm"]).unwrap();
        assert_eq!((spec.pool.as_str(), spec.name.as_str()), ("rbd", "disk"));
        assert_eq!(spec.snapshot.as_deref(), Some("monday"));
        assert!(spec.read_only, "a snapshot is never written");
        assert_eq!(spec.label(), "rbd/team/disk@monday");
        let plain = parse(&["image=rbd/disk"]).unwrap();
        assert_eq!((plain.id.as_str(), plain.read_only), ("admin", false));
        assert!(parse(&["image=rbd/disk", "readonly=true"]).unwrap().read_only);
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_form() {
        for image in ["", "disk", "/disk", "rbd/", "rbd/disk@", "rbd/@snap", "rbd/team/disk"] {
            let why = parse(&[&format!("image={image}")]).unwrap_err();
            assert!(why.contains("POOL/NAME"), "{image}: {why}");
        }
        let why = parse(&["image=rbd/team/disk"]).unwrap_err();
        assert!(why.contains("namespace="), "{why}");
        let why = parse(&["image=rbd/disk", "id=client.vm"]).unwrap_err();
        assert!(why.contains("id=vm"), "{why}");
        assert!(parse(&["image=rbd/disk", "conf=a\nb"]).is_err());
    }
}
