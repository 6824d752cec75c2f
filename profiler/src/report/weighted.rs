//! The stacks of a profile with a weight each: what folded, svg and pprof draw.

use std::collections::HashMap;

use super::Note;
use crate::profile::{Profile, ProfileSite, Stack};

/// One stack of a site and what it weighs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weighted<'a> {
    pub site: &'a ProfileSite,
    pub path: Path<'a>,
    pub registered: u64,
    /// In ns; `None` if the site's cost is not known.
    pub cost_ns: Option<f64>,
}

/// How a site was reached.
#[derive(Clone, Copy, Debug)]
pub(super) enum Path<'a> {
    /// By this stack.
    Stack(&'a Stack),
    /// Stacks were recorded, but not for these.
    Lost,
    /// Stacks were not recorded.
    Unknown,
}

impl<'a> Weighted<'a> {
    /// Every stack that registered, site by site. What a site registered beyond its stacks follows
    /// as one more, so that the sum is always the site's own count.
    pub fn all(profile: &'a Profile) -> (Vec<Self>, Vec<Note>) {
        let mut by_site: HashMap<&str, Vec<&Stack>> = HashMap::new();
        for stack in profile.stacks.iter().flatten() {
            by_site.entry(&stack.site).or_default().push(stack);
        }
        let mut all = Vec::new();
        for site in profile.sites.iter().filter(|site| site.count() > 0) {
            let mut left = site.count();
            let mut cost_left = site.cost_ns;
            for stack in by_site.remove(site.info.id.as_str()).unwrap_or_default() {
                // Two maps read one after the other may differ by the hits between.
                let registered = stack.registered.min(left);
                if registered == 0 {
                    continue;
                }
                left -= registered;
                cost_left = cost_left.zip(stack.cost_ns).map(|(all, one)| all - one);
                all.push(Self {
                    site,
                    path: Path::Stack(stack),
                    registered,
                    cost_ns: stack.cost_ns,
                });
            }
            if left > 0 {
                all.push(Self {
                    site,
                    path: match profile.stacks {
                        Some(_) => Path::Lost,
                        None => Path::Unknown,
                    },
                    registered: left,
                    cost_ns: cost_left.map(|ns| ns.max(0.0)),
                });
            }
        }
        let mut notes = Vec::new();
        if all.is_empty() {
            notes.push(Note::Empty);
        } else if profile.stacks.is_none() {
            notes.push(Note::NoStacks);
        }
        (all, notes)
    }

    /// The functions, root first, without the site itself.
    pub fn functions(&self) -> Vec<&'a str> {
        let alone = self.site.info.function.as_str();
        match self.path {
            Path::Stack(stack) if stack.frames.is_empty() => vec![alone],
            Path::Stack(stack) => stack.frames.iter().rev().map(String::as_str).collect(),
            Path::Lost => vec![LOST, alone],
            Path::Unknown => vec![alone],
        }
    }

    /// The frame that stands for the statement: `defer main.handle#1 [heap]`.
    pub fn site_frame(&self) -> String {
        let info = &self.site.info;
        format!("defer {} [{}]", info.id, info.mechanism)
    }
}

/// The root of what has no stack in a profile with stacks.
pub(super) const LOST: &str = "[stack not recorded]";
