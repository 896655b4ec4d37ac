//! The two rules: no circle between the files of a crate, and all arrows along the lists of modules in one direction.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    graph::{Arrows, Uses, ancestors},
    source::Module,
};

/// Largest number of names that are shown for one arrow.
const SHOWN: usize = 4;

/// Result of the rules for a crate.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// Direction of the arrows along the lists of modules, as text.
    pub(crate) direction: String,
    /// Violations of the rules.
    pub(crate) errors: Vec<String>,
}

/// Judges the arrows of a crate.
pub(crate) fn judge(modules: &[Module], arrows: &Arrows) -> Verdict {
    let mut errors = circles(modules, arrows);
    let steps = steps(modules, arrows);
    let (up, down): (Vec<&Step>, Vec<&Step>) = steps.iter().partition(|step| step.to < step.from);
    let (place, wrong) = if up.len() >= down.len() {
        ("above", down)
    } else {
        ("below", up)
    };
    let direction = match steps.len() {
        0 => "no arrows along a list of modules".to_owned(),
        all => format!("what is used stands {place} ({} of {all} arrows)", all - wrong.len()),
    };
    let mut against: BTreeMap<(usize, usize, usize), String> = BTreeMap::new();
    for step in wrong {
        let lines = against.entry((step.list, step.from, step.to)).or_default();
        lines.push_str(&shown(modules, step.arrow, &arrows[&step.arrow]));
    }
    errors.extend(against.into_iter().map(|((list, from, to), lines)| {
        let list = &modules[list];
        let entry = |place: usize| {
            let module = &modules[list.children[place]];
            format!("`{}` (line {})", module.name, module.declared)
        };
        let (file, from, to) = (list.file.display(), entry(from), entry(to));
        format!("{from} uses {to} against the order of {file}, where what is used stands {place}:{lines}")
    }));
    Verdict { direction, errors }
}

/// An arrow between two modules of one list.
struct Step {
    arrow: (usize, usize),
    list: usize,
    /// Place in the list of the using module.
    from: usize,
    /// Place in the list of the used module.
    to: usize,
}

/// Returns the arrows between modules with a common parent, and between modules whose ancestors have a common parent.
fn steps(modules: &[Module], arrows: &Arrows) -> Vec<Step> {
    let mut steps = Vec::new();
    for &(user, used) in arrows.keys() {
        let (mut users, mut useds) = (ancestors(modules, user), ancestors(modules, used));
        let mut list = 0;
        let (from, to) = loop {
            match (users.pop(), useds.pop()) {
                (Some(a), Some(b)) if a == b => list = a,
                ends => break ends,
            }
        };
        // one module holds the other: a parent is in no list with its children
        let (Some(from), Some(to)) = (from, to) else { continue };
        let place = |module| modules[list].children.iter().position(|child| *child == module);
        let (Some(from), Some(to)) = (place(from), place(to)) else {
            continue;
        };
        let arrow = (user, used);
        steps.push(Step { arrow, list, from, to });
    }
    steps
}

/// Returns an error for each group of files that reach each other.
fn circles(modules: &[Module], arrows: &Arrows) -> Vec<String> {
    let file = |module: usize| modules[module].file.as_path();
    let reached = |start| {
        let mut seen = BTreeSet::new();
        let mut next = vec![start];
        while let Some(at) = next.pop() {
            for &(user, used) in arrows.keys() {
                if file(user) == at && file(used) != at && seen.insert(file(used)) {
                    next.push(file(used));
                }
            }
        }
        seen
    };
    let mut errors = Vec::new();
    let mut told = BTreeSet::new();
    for module in modules {
        let start = module.file.as_path();
        if told.contains(start) || !reached(start).contains(start) {
            continue;
        }
        let circle: BTreeSet<_> = reached(start)
            .into_iter()
            .filter(|other| reached(other).contains(start))
            .collect();
        let names: Vec<String> = circle.iter().map(|file| file.display().to_string()).collect();
        let mut error = format!("a circle between {} files, {}:", circle.len(), names.join(", "));
        for (&(user, used), uses) in arrows {
            if file(user) != file(used) && circle.contains(file(user)) && circle.contains(file(used)) {
                error.push_str(&shown(modules, (user, used), uses));
            }
        }
        told.extend(circle);
        errors.push(error);
    }
    errors
}

/// Returns a line with both files of an arrow, the used names and their lines.
fn shown(modules: &[Module], (user, used): (usize, usize), uses: &Uses) -> String {
    let (user, used) = (modules[user].file.display(), modules[used].file.display());
    let name =
        |(name, (at, defined)): (&String, &(usize, usize))| format!("`{name}` (line {at}, defined in line {defined})");
    let mut names: Vec<String> = uses.iter().take(SHOWN).map(name).collect();
    if uses.len() > SHOWN {
        names.push(format!("{} names more", uses.len() - SHOWN));
    }
    format!("\n    {user} uses {used}: {}", names.join(", "))
}
