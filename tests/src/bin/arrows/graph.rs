//! From modules to arrows: every import and path resolved to the module that defines what it names.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::Module;

/// What one module uses of another: each name with the line of its first use and that of its definition.
pub(crate) type Uses = BTreeMap<String, (usize, usize)>;

/// All uses, by the numbers of the module that uses and the module that is used.
pub(crate) type Arrows = BTreeMap<(usize, usize), Uses>;

/// Where a path leads.
enum Target {
    Module(usize),
    Item { module: usize, name: String, line: usize },
}

/// Names that are being looked up: an import may lead to itself.
type Open = BTreeSet<(usize, String)>;

/// Returns the arrows between the modules of one crate.
///
/// A module that re-exports what its descendants define does not use them by that, and a path that leads through a re-export leads to the
/// definition. What a macro defines counts as defined in the first line of the module that is named.
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

/// Returns a module and all that hold it, from itself to the root.
pub(crate) fn ancestors(modules: &[Module], module: usize) -> Vec<usize> {
    std::iter::successors(Some(module), |module| modules[*module].parent).collect()
}

/// Follows a path from a module; `None` where it leaves the crate.
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

/// Finds a name in a module. The last name of a path is an item rather than a module, another one a module rather than an item.
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
        // what comes from another crate is at home where it is imported
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
