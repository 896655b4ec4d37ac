//! From modules to arrows: every import and path is resolved to the module of the definition.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::Module;

/// Names that one module uses of another, each with the lines of its first use and of its definition.
pub(crate) type Uses = BTreeMap<String, (usize, usize)>;

/// All uses, by the numbers of the using and the used module.
pub(crate) type Arrows = BTreeMap<(usize, usize), Uses>;

/// Target of a path.
enum Target {
    Module(usize),
    Item { module: usize, name: String, line: usize },
}

/// Names whose lookup is in progress: an import may lead to itself.
type Open = BTreeSet<(usize, String)>;

/// Returns the arrows between the modules of one crate.
///
/// A re-export of a descendant's definition is not a use, and a path through a re-export leads to the definition. An item that a macro
/// defines counts as defined in the first line of the named module.
pub(crate) fn arrows(modules: &[Module]) -> Arrows {
    let mut arrows = Arrows::new();
    for (from, module) in modules.iter().enumerate() {
        let imports = module
            .imports
            .iter()
            .map(|import| (&import.path, import.line, import.exported));
        let mentions = module
            .mentions
            .iter()
            .map(|mention| (&mention.path, mention.line, false));
        for (path, line, exported) in imports.chain(mentions) {
            let Some(Target::Item {
                module: to,
                name,
                line: defined,
            }) = resolve(modules, from, path, &mut Open::new())
            else {
                continue;
            };
            if to == from || exported && ancestors(modules, to).contains(&from) {
                continue;
            }
            arrows
                .entry((from, to))
                .or_default()
                .entry(name)
                .or_insert((line, defined));
        }
    }
    arrows
}

/// Returns a module and its ancestors, up to the root.
pub(crate) fn ancestors(modules: &[Module], module: usize) -> Vec<usize> {
    std::iter::successors(Some(module), |module| modules[*module].parent).collect()
}

/// Follows a path from a module; `None` for a path out of the crate.
fn resolve(modules: &[Module], from: usize, path: &[String], open: &mut Open) -> Option<Target> {
    let (first, mut rest) = path.split_first()?;
    let mut at = match first.as_str() {
        "crate" => Target::Module(0),
        "self" => Target::Module(from),
        "super" => Target::Module(modules[from].parent?),
        name => find(modules, from, name, rest.is_empty(), open)?,
    };
    while let (&Target::Module(module), Some((next, after))) = (&at, rest.split_first()) {
        rest = after;
        at = if next == "super" {
            Target::Module(modules[module].parent?)
        } else {
            let unseen = item(module, next, 1);
            find(modules, module, next, rest.is_empty(), open).unwrap_or(unseen)
        };
    }
    Some(at)
}

fn item(module: usize, name: &str, line: usize) -> Target {
    let name = name.to_owned();
    Target::Item { module, name, line }
}

/// Finds a name in a module. The last name of a path prefers an item to a module; earlier names prefer a module.
fn find(modules: &[Module], module: usize, name: &str, last: bool, open: &mut Open) -> Option<Target> {
    if !open.insert((module, name.to_owned())) {
        return None;
    }
    let within = &modules[module];
    let child = || {
        let mut children = within.children.iter().copied();
        children.find(|child| modules[*child].name == name).map(Target::Module)
    };
    let defined = || {
        let (_, line) = within.items.iter().find(|(item, _)| item == name)?;
        Some(item(module, name, *line))
    };
    let here = if last {
        defined().or_else(child)
    } else {
        child().or_else(defined)
    };
    let imported = |open: &mut Open| {
        let import = within
            .imports
            .iter()
            .find(|import| import.name.as_deref() == Some(name))?;
        // an item of another crate counts as defined at its import
        let foreign = item(module, name, import.line);
        Some(resolve(modules, module, &import.path, open).unwrap_or(foreign))
    };
    let globbed = |open: &mut Open| {
        let mut globs = within.imports.iter().filter(|import| import.name.is_none());
        globs.find_map(|glob| match resolve(modules, module, &glob.path, open) {
            Some(Target::Module(source)) if source != module => find(modules, source, name, last, open),
            _ => None,
        })
    };
    let found = here.or_else(|| imported(open)).or_else(|| globbed(open));
    open.remove(&(module, name.to_owned()));
    found
}
