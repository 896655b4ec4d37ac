//! `arrows`: fails when files of a crate of this workspace use each other in a circle, or against the order of the modules.
//!
//! `scripts/check` runs this program. Only names are seen (imports, paths, macros, attributes), not method calls.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;

mod source;
mod graph;
mod judge;
#[cfg(test)]
mod tests;

/// Checks that the files of each crate use each other without a circle and in one direction along the lists of modules.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Folder of the workspace; default: the current folder.
    workspace: Option<PathBuf>,
}

/// Returns the root files of all crates of a package: the library, the program and those in `src/bin`.
fn roots(package: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let src = package.join("src");
    let mut roots = vec![src.join("lib.rs"), src.join("main.rs")];
    if src.join("bin").is_dir() {
        for entry in std::fs::read_dir(src.join("bin"))? {
            let path = entry?.path();
            roots.push(if path.is_dir() { path.join("main.rs") } else { path });
        }
    }
    roots.retain(|root| root.is_file());
    roots.sort();
    Ok(roots)
}

/// Returns the folders of the workspace's packages.
fn packages(workspace: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let path = workspace.join("Cargo.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
    let manifest: toml::Table = text
        .parse()
        .with_context(|| format!("failed to parse `{}`", path.display()))?;
    let members = manifest
        .get("workspace")
        .and_then(|table| table.get("members")?.as_array());
    let members = members.with_context(|| format!("failed to find `workspace.members` in `{}`", path.display()))?;
    Ok(members
        .iter()
        .filter_map(|member| Some(workspace.join(member.as_str()?)))
        .collect())
}

fn run(workspace: &Path) -> anyhow::Result<bool> {
    let mut out = std::io::stdout();
    let mut good = true;
    for package in packages(workspace)? {
        for root in roots(&package)? {
            let modules = source::modules(&root)?;
            let verdict = judge::judge(&modules, &graph::arrows(&modules));
            writeln!(out, "{}: {}", root.display(), verdict.direction)?;
            for error in &verdict.errors {
                writeln!(out, "  {error}")?;
            }
            good &= verdict.errors.is_empty();
        }
    }
    Ok(good)
}

fn main() -> anyhow::Result<ExitCode> {
    let good = run(&Cli::parse().workspace.unwrap_or_default())?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
