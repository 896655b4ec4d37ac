//! The modules of a crate as written, with declarations, imports and mentions. Code that only tests compile is excluded.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, ImplItem, Item, ItemMod, ItemUse, Macro, UseTree, Visibility,
    ext::IdentExt,
    spanned::Spanned,
    visit::{self, Visit},
};

/// Keys of `serde` attributes whose text is a path.
const SERDE_PATHS: [&str; 9] = [
    "default",
    "deserialize_with",
    "from",
    "into",
    "remote",
    "serialize_with",
    "skip_serializing_if",
    "try_from",
    "with",
];

/// A `use` of one name.
#[derive(Debug)]
pub(crate) struct Import {
    /// Bound name; `None` for a glob.
    pub(crate) name: Option<String>,
    /// Imported path, as written.
    pub(crate) path: Vec<String>,
    /// Line in the file.
    pub(crate) line: usize,
    /// Whether other modules may see the name.
    pub(crate) exported: bool,
}

/// A path in the code of a module.
#[derive(Debug)]
pub(crate) struct Mention {
    /// Segments, as written.
    pub(crate) path: Vec<String>,
    /// Line in the file.
    pub(crate) line: usize,
}

/// One module.
#[derive(Debug)]
pub(crate) struct Module {
    /// Name; `crate` for the root.
    pub(crate) name: String,
    /// File that holds it.
    pub(crate) file: PathBuf,
    /// Line of its declaration in the parent's file; 1 for the root.
    pub(crate) declared: usize,
    /// Parent; `None` for the root.
    pub(crate) parent: Option<usize>,
    /// Children in the order of their declarations.
    pub(crate) children: Vec<usize>,
    /// Defined items, each with its line.
    pub(crate) items: Vec<(String, usize)>,
    /// All `use` of the module.
    pub(crate) imports: Vec<Import>,
    /// All paths of the module outside of `use`.
    pub(crate) mentions: Vec<Mention>,
    /// Folder of the children's files.
    folder: PathBuf,
}

/// Reads the modules of a crate from its root file; the root is the first module.
///
/// # Errors
/// A file is missing or is not valid Rust.
pub(crate) fn modules(root: &Path) -> anyhow::Result<Vec<Module>> {
    let mut reader = Reader {
        modules: Vec::new(),
        current: 0,
        failed: None,
    };
    let folder = root.parent().unwrap_or(Path::new("")).to_owned();
    reader.add("crate", root.to_owned(), 1, None, folder);
    reader.read_file(root)?;
    match reader.failed {
        Some(error) => Err(error),
        None => Ok(reader.modules),
    }
}

struct Reader {
    modules: Vec<Module>,
    current: usize,
    failed: Option<anyhow::Error>,
}

impl Reader {
    fn add(&mut self, name: &str, file: PathBuf, declared: usize, parent: Option<usize>, folder: PathBuf) -> usize {
        let number = self.modules.len();
        self.modules.push(Module {
            name: name.to_owned(),
            file,
            declared,
            parent,
            children: Vec::new(),
            items: Vec::new(),
            imports: Vec::new(),
            mentions: Vec::new(),
            folder,
        });
        if let Some(parent) = parent {
            self.modules[parent].children.push(number);
        }
        number
    }

    fn read_file(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let file = syn::parse_file(&text).with_context(|| format!("failed to parse `{}`", path.display()))?;
        self.read_items(&file.items);
        Ok(())
    }

    fn read_items(&mut self, items: &[Item]) {
        for item in items.iter().filter(|item| !only_for_tests(item_attributes(item))) {
            if let Some(name) = item_name(item) {
                let defined = (name, line(item));
                self.modules[self.current].items.push(defined);
            }
            self.visit_item(item);
        }
    }

    /// Reads a module with a body, or the file of a module without a body.
    fn read_module(&mut self, item: &ItemMod) -> anyhow::Result<()> {
        let name = item.ident.unraw().to_string();
        let parent = &self.modules[self.current];
        let folder = parent.folder.join(&name);
        let file = if item.content.is_some() {
            parent.file.clone()
        } else {
            let candidates = [parent.folder.join(format!("{name}.rs")), folder.join("mod.rs")];
            let Some(file) = candidates.iter().find(|path| path.is_file()) else {
                bail!(
                    "failed to find module `{name}` of `{}`: expected {}",
                    parent.file.display(),
                    candidates.map(|path| format!("`{}`", path.display())).join(" or ")
                );
            };
            file.clone()
        };
        let outer = self.current;
        self.current = self.add(&name, file.clone(), line(&item.ident), Some(outer), folder);
        if let Some((_, items)) = &item.content {
            self.read_items(items);
        } else {
            self.read_file(&file)?;
        }
        self.current = outer;
        Ok(())
    }

    fn mention(&mut self, path: Vec<String>, line: usize) {
        self.modules[self.current].mentions.push(Mention { path, line });
    }

    fn import(&mut self, tree: &UseTree, path: &mut Vec<String>, exported: bool) {
        let (name, last) = match tree {
            UseTree::Path(part) => {
                path.push(part.ident.unraw().to_string());
                self.import(&part.tree, path, exported);
                path.pop();
                return;
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(tree, path, exported);
                }
                return;
            }
            UseTree::Glob(_) => (None, None),
            UseTree::Name(part) if part.ident == "self" => (path.last().cloned(), None),
            UseTree::Name(part) => {
                let name = part.ident.unraw().to_string();
                (Some(name.clone()), Some(name))
            }
            UseTree::Rename(part) => {
                let last = Some(part.ident.unraw().to_string()).filter(|name| name != "self");
                (Some(part.rename.unraw().to_string()), last)
            }
        };
        let import = Import {
            name,
            path: path.iter().cloned().chain(last).collect(),
            line: line(tree),
            exported,
        };
        self.modules[self.current].imports.push(import);
    }

    /// Mentions every path in the tokens of a macro or an attribute. A name after a dot is a field or a method.
    fn scan(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let (mut place, mut after_dot) = (0, false);
        while let Some(token) = tokens.get(place) {
            place += 1;
            match token {
                TokenTree::Ident(first) => {
                    let mut path = vec![first.unraw().to_string()];
                    while let Some([TokenTree::Punct(a), TokenTree::Punct(b), TokenTree::Ident(next)]) =
                        tokens.get(place..place + 3)
                        && (a.as_char(), b.as_char()) == (':', ':')
                    {
                        path.push(next.unraw().to_string());
                        place += 3;
                    }
                    if !after_dot {
                        self.mention(path, line(first));
                    }
                }
                TokenTree::Group(group) => self.scan(group.stream()),
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
            after_dot = matches!(token, TokenTree::Punct(mark) if mark.as_char() == '.');
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        if !only_for_tests(item_attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let attributes = match item {
            ImplItem::Const(syn::ImplItemConst { attrs, .. })
            | ImplItem::Fn(syn::ImplItemFn { attrs, .. })
            | ImplItem::Macro(syn::ImplItemMacro { attrs, .. })
            | ImplItem::Type(syn::ImplItemType { attrs, .. }) => attrs.as_slice(),
            _ => &[],
        };
        if !only_for_tests(attributes) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if let Err(error) = self.read_module(item) {
            self.failed.get_or_insert(error);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            let exported = !matches!(item.vis, Visibility::Inherited);
            self.import(&item.tree, &mut Vec::new(), exported);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let segments = path.segments.iter().map(|part| part.ident.unraw().to_string());
            self.mention(segments.collect(), line(path));
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast Macro) {
        self.visit_path(&called.path);
        self.scan(called.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        let syn::Meta::List(list) = &attribute.meta else {
            return;
        };
        self.scan(list.tokens.clone());
        if list.path.is_ident("serde") {
            for (path, line) in serde_paths(list.tokens.clone()) {
                self.mention(path, line);
            }
        }
    }

    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

/// Returns the paths that the texts of a `serde` attribute name.
fn serde_paths(tokens: TokenStream) -> Vec<(Vec<String>, usize)> {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let texts = tokens.array_windows().filter_map(|window| match window {
        [TokenTree::Ident(key), TokenTree::Punct(_), TokenTree::Literal(text)]
            if SERDE_PATHS.iter().any(|known| key == known) =>
        {
            let text = syn::parse_str::<syn::LitStr>(&text.to_string()).ok()?;
            let path = text.parse::<syn::Path>().ok()?;
            Some((
                path.segments.iter().map(|part| part.ident.to_string()).collect(),
                line(key),
            ))
        }
        _ => None,
    });
    texts.collect()
}

fn line(spanned: &impl Spanned) -> usize {
    spanned.span().start().line
}

/// Returns whether an attribute excludes code from every build except tests.
fn only_for_tests(attributes: &[Attribute]) -> bool {
    fn needs_test(tokens: TokenStream) -> bool {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        tokens.iter().enumerate().any(|(place, token)| match token {
            TokenTree::Ident(name) if name == "test" => true,
            TokenTree::Ident(name) if name == "all" => {
                matches!(tokens.get(place + 1), Some(TokenTree::Group(group)) if needs_test(group.stream()))
            }
            _ => false,
        })
    }
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) => list.path.is_ident("cfg") && needs_test(list.tokens.clone()),
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::NameValue(_) => false,
    })
}

fn item_attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(syn::ItemConst { attrs, .. })
        | Item::Enum(syn::ItemEnum { attrs, .. })
        | Item::Fn(syn::ItemFn { attrs, .. })
        | Item::Impl(syn::ItemImpl { attrs, .. })
        | Item::Macro(syn::ItemMacro { attrs, .. })
        | Item::Mod(ItemMod { attrs, .. })
        | Item::Static(syn::ItemStatic { attrs, .. })
        | Item::Struct(syn::ItemStruct { attrs, .. })
        | Item::Trait(syn::ItemTrait { attrs, .. })
        | Item::Type(syn::ItemType { attrs, .. })
        | Item::Union(syn::ItemUnion { attrs, .. })
        | Item::Use(ItemUse { attrs, .. }) => attrs,
        _ => &[],
    }
}

/// Returns the name that an item defines; a module is not an item here.
fn item_name(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(syn::ItemConst { ident, .. })
        | Item::Enum(syn::ItemEnum { ident, .. })
        | Item::Static(syn::ItemStatic { ident, .. })
        | Item::Struct(syn::ItemStruct { ident, .. })
        | Item::Trait(syn::ItemTrait { ident, .. })
        | Item::Type(syn::ItemType { ident, .. })
        | Item::Union(syn::ItemUnion { ident, .. }) => ident,
        Item::Fn(function) => &function.sig.ident,
        Item::Macro(called) => called.ident.as_ref()?,
        _ => return None,
    };
    Some(name.unraw().to_string())
}
