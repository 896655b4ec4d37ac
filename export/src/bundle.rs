//! Writing of bundles: checks weights, builds graphs or links the graphs of an earlier version, publishes all files at once.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use policy::{
    bundle::{
        BUNDLE_VERSION, Bundle, BundleError, BundleFile, EXPERT_WEIGHTS, FLOW_TIME, Manifest, SelfTest, Source,
        TOKENIZER_MODEL, VLM_WEIGHTS, publish,
    },
    config::{Flavour, Precision, TokenizerConfig, WeightMode},
    contract::ContractError,
    cuda::CudaError,
    dims::DimsError,
    flow::Sampling,
    graph::{DENOISE_GRAPH, PREFIX_GRAPH},
    norm::NormStats,
    params::{ParamSpec, expert_params, vlm_params},
    plan::RunPlan,
    prompt::{PromptError, Tokenizer, read_model},
    weights::{Layout, Location, WeightFile, Weights, WeightsError},
};

use crate::{
    builder::GraphError,
    graph::{GraphOptions, cuda::cuda_graphs, denoise::denoise_graph, prefix::prefix_graph},
};

/// Error of writing a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The sizes are invalid.
    #[error(transparent)]
    Dims(#[from] DimsError),
    /// A graph cannot be built.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The policy has no graphs of flavour `cuda`.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The weights of graphs of flavour `cuda` are not graph inputs.
    #[error("`weights` is `constants`, expected `inputs` for graphs of flavour `cuda`")]
    CudaWeights,
    /// The configuration, its statistics and its tokenizer contradict each other.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// A file cannot be written or read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The weights do not match the policy.
    #[error("weights for `{file}`: {source}")]
    Weights {
        /// File of the bundle.
        file: &'static str,
        /// Cause.
        source: WeightsError,
    },
    /// The tensors have other locations than the reused graphs expect.
    #[error(
        "tensor `{name}` of `{file}` lies at {found}, the reused graph reads it at {expected}: build the graphs again"
    )]
    Layout {
        /// File of the bundle.
        file: &'static str,
        /// Name of the first differing tensor.
        name: String,
        /// Location in the graph.
        expected: String,
        /// Location in the file.
        found: String,
    },
    /// The reused graphs were built for another policy.
    #[error("the graphs of version {version} cannot be reused: `{key}` differs")]
    Reuse {
        /// Version of the earlier bundle.
        version: u64,
        /// The differing key of the manifest.
        key: &'static str,
    },
    /// The tokenizer's file is missing, or is given for a word list.
    #[error("bundle tokenizer: {0}")]
    Tokenizer(&'static str),
    /// The tokenizer's model is not usable.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The tokenizer has ids without an embedding.
    #[error(
        "tokenizer model `{path}` has {found} ids, `actor.model.vocab` is {vocab}: take the tokenizer of the checkpoint"
    )]
    Vocabulary {
        /// Path of the model file.
        path: PathBuf,
        /// Number of ids in the model.
        found: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
}

/// Source of a weight file of a new bundle.
#[derive(Debug)]
pub enum WeightSource<'a> {
    /// Weights to write in F32, one tensor at a time.
    Weights(&'a dyn Weights),
    /// A file of another bundle, which is linked and not copied.
    Same(PathBuf, BundleFile),
}

/// Source of the graphs of a new bundle.
#[derive(Debug)]
pub enum GraphSource<'a> {
    /// Graphs to build for the bundle's sizes and weight files.
    Build,
    /// The graphs of an earlier bundle with the same sizes and the same layout of the weight files, which are linked.
    Reuse(&'a Bundle),
}

/// Contents of a new bundle.
#[derive(Debug)]
pub struct BundleSpec<'a> {
    /// The manifest; [`write_bundle`] sets `files`, `format_version` and `flow_time`.
    pub manifest: Manifest,
    /// Weights of the vision-language model.
    pub vlm: WeightSource<'a>,
    /// Weights of the action expert and the value head.
    pub expert: WeightSource<'a>,
    /// Source of the graphs.
    pub graphs: GraphSource<'a>,
    /// `SentencePiece` model, if the manifest's tokenizer is of this kind.
    pub tokenizer: Option<Source<'a>>,
}

/// Returns the manifest of a run's bundle, without `files`.
///
/// A `batch` of `None` is symbolic; for graphs of flavour `cuda`, which have no symbolic batch, it is `rollout.max_batch`. The path of
/// a tokenizer model becomes the file's name in the bundle.
pub fn manifest_of(
    plan: &RunPlan,
    policy_version: u64,
    batch: Option<usize>,
    norm_stats: Option<NormStats>,
    self_test: Option<SelfTest>,
) -> Manifest {
    let (model, rollout) = (&plan.config.actor.model, &plan.config.rollout);
    let flavour = rollout.provider.flavour();
    Manifest {
        format_version: BUNDLE_VERSION,
        policy_version,
        flow_time: FLOW_TIME.to_owned(),
        dims: plan.dims.clone(),
        heads: plan.heads.clone(),
        sampling: plan.sampling(policy_version),
        action_chunk: model.num_action_chunks,
        env_action_dim: model.env_action_dim,
        env_state_dim: model.env_state_dim,
        cameras: model.cameras.clone(),
        tokenizer: match &model.tokenizer {
            TokenizerConfig::SentencePiece { .. } => TokenizerConfig::SentencePiece {
                model: TOKENIZER_MODEL.into(),
            },
            words @ TokenizerConfig::Words { .. } => words.clone(),
        },
        discrete_state_input: model.discrete_state_input,
        normalization: model.normalization,
        norm_stats,
        delta_actions: model.delta_actions.clone(),
        flavour,
        precision: rollout.precision,
        weights: rollout.weights,
        batch: match flavour {
            Flavour::Plain => batch,
            Flavour::Cuda => batch.or(Some(rollout.max_batch)),
        },
        config_digest: plan.config_digest.clone(),
        self_test,
        files: Vec::new(),
    }
}

/// Returns the bytes of the run's tokenizer model for the bundle; `None` for a word list.
///
/// # Errors
/// The model cannot be read or has more ids than the policy's embedding has rows.
pub fn tokenizer_of(plan: &RunPlan) -> Result<Option<Source<'static>>, ExportError> {
    let TokenizerConfig::SentencePiece { model } = &plan.config.actor.model.tokenizer else {
        return Ok(None);
    };
    let (found, vocab) = (Tokenizer::from_sentencepiece(model)?.vocab_size(), plan.dims.vocab);
    if found > vocab {
        return Err(ExportError::Vocabulary {
            path: model.clone(),
            found,
            vocab,
        });
    }
    Ok(Some(Source::Bytes(read_model(model)?)))
}

/// Writes a bundle to `dir`, which must not exist: the main entry point of this crate.
///
/// # Errors
/// The weights are not exactly the policy's or not finite, the graphs do not match the weights, or a file operation failed. After
/// an error `dir` does not exist.
pub fn write_bundle(dir: &Path, spec: BundleSpec<'_>) -> Result<Bundle, ExportError> {
    let BundleSpec {
        mut manifest,
        vlm,
        expert,
        graphs,
        tokenizer,
    } = spec;
    manifest.dims.check()?;
    manifest.format_version = BUNDLE_VERSION;
    FLOW_TIME.clone_into(&mut manifest.flow_time);
    if manifest.flavour == Flavour::Cuda && manifest.weights != WeightMode::Inputs {
        return Err(ExportError::CudaWeights);
    }
    let vlm_params = vlm_params(&manifest.dims);
    let expert_params = expert_params(&manifest.dims, &manifest.heads);
    let (vlm, vlm_locations) = weight_file(VLM_WEIGHTS, vlm, &vlm_params, manifest.precision)?;
    let (expert, expert_locations) = weight_file(EXPERT_WEIGHTS, expert, &expert_params, manifest.precision)?;
    let mut files = match graphs {
        GraphSource::Build => build_graphs(&manifest, &vlm_locations, &expert_locations)?,
        GraphSource::Reuse(earlier) => {
            reusable(earlier, &manifest)?;
            if manifest.flavour == Flavour::Plain {
                same_layout(VLM_WEIGHTS, &file_locations(earlier, VLM_WEIGHTS)?, &vlm_locations)?;
            }
            if manifest.weights == WeightMode::Constants {
                same_layout(
                    EXPERT_WEIGHTS,
                    &file_locations(earlier, EXPERT_WEIGHTS)?,
                    &expert_locations,
                )?;
            }
            let names = manifest.graph_files()?;
            names
                .into_iter()
                .map(|name| same_file(earlier, &name).map(|source| (name, source)))
                .collect::<Result<_, _>>()?
        }
    };
    files.push((VLM_WEIGHTS.to_owned(), vlm));
    files.push((EXPERT_WEIGHTS.to_owned(), expert));
    match (&manifest.tokenizer, tokenizer) {
        (TokenizerConfig::SentencePiece { .. }, Some(source)) => files.push((TOKENIZER_MODEL.to_owned(), source)),
        (TokenizerConfig::Words { .. }, None) => {}
        (TokenizerConfig::SentencePiece { .. }, None) => {
            return Err(ExportError::Tokenizer(
                "the manifest names a model file, but none is given",
            ));
        }
        (TokenizerConfig::Words { .. }, Some(_)) => {
            return Err(ExportError::Tokenizer(
                "a model file is given, but the manifest lists words",
            ));
        }
    }
    publish(dir, files, manifest).map_err(|error| match error {
        BundleError::Weights { path, source } => ExportError::Weights {
            file: if path.ends_with(VLM_WEIGHTS) {
                VLM_WEIGHTS
            } else {
                EXPERT_WEIGHTS
            },
            source,
        },
        other => other.into(),
    })
}

/// Returns the graphs of a bundle, as file names and contents.
fn build_graphs<'a>(
    manifest: &Manifest,
    vlm: &BTreeMap<String, Location>,
    expert: &BTreeMap<String, Location>,
) -> Result<Vec<(String, Source<'a>)>, ExportError> {
    let (dims, heads) = (&manifest.dims, &manifest.heads);
    let graphs = if let Some(contract) = manifest.cuda()? {
        cuda_graphs(&contract)?
    } else {
        let options = GraphOptions {
            batch: manifest.batch,
            debug: false,
        };
        let prefix = prefix_graph(dims, heads.pooling(), vlm, options)?;
        let denoise = denoise_graph(dims, heads, expert, manifest.weights, options)?;
        vec![(PREFIX_GRAPH.to_owned(), prefix), (DENOISE_GRAPH.to_owned(), denoise)]
    };
    Ok(graphs
        .into_iter()
        .map(|(name, bytes)| (name, Source::Bytes(bytes)))
        .collect())
}

/// Changes between a policy version and its predecessor.
#[derive(Debug)]
pub struct NextVersion<'a> {
    /// Number of the version.
    pub policy_version: u64,
    /// Sampling of the version, whose noise level may change.
    pub sampling: Sampling,
    /// Weights of action expert and heads.
    pub expert: &'a dyn Weights,
    /// Reference output of the version.
    pub self_test: Option<SelfTest>,
}

/// Writes the next policy version; unchanged files are linked from the preceding bundle.
///
/// # Errors
/// See [`write_bundle`].
pub fn next_version(earlier: &Bundle, dir: &Path, next: NextVersion<'_>) -> Result<Bundle, ExportError> {
    let mut manifest = earlier.manifest.clone();
    manifest.policy_version = next.policy_version;
    manifest.sampling = next.sampling;
    manifest.self_test = next.self_test;
    let entry = entry_of(earlier, VLM_WEIGHTS)?;
    let tokenizer = match earlier.manifest.file(TOKENIZER_MODEL) {
        Some(_) => Some(same_file(earlier, TOKENIZER_MODEL)?),
        None => None,
    };
    let spec = BundleSpec {
        manifest,
        vlm: WeightSource::Same(earlier.path(VLM_WEIGHTS), entry),
        expert: WeightSource::Weights(next.expert),
        graphs: GraphSource::Reuse(earlier),
        tokenizer,
    };
    write_bundle(dir, spec)
}

fn entry_of(bundle: &Bundle, name: &str) -> Result<BundleFile, ExportError> {
    let entry = bundle.manifest.file(name).cloned();
    Ok(entry.ok_or_else(|| BundleError::Manifest {
        path: bundle.dir().to_owned(),
        detail: format!("`files` lacks `{name}`"),
    })?)
}

fn same_file(bundle: &Bundle, name: &str) -> Result<Source<'static>, ExportError> {
    Ok(Source::Same(bundle.path(name), entry_of(bundle, name)?))
}

fn file_locations(bundle: &Bundle, file: &'static str) -> Result<BTreeMap<String, Location>, ExportError> {
    let weights = WeightFile::open(&bundle.path(file)).map_err(|source| ExportError::Weights { file, source })?;
    Ok(weights.locations())
}

/// Returns the source and the tensor locations of a weight file. A linked file was checked when written; other weights are
/// checked here.
fn weight_file<'a>(
    file: &'static str,
    source: WeightSource<'a>,
    params: &[ParamSpec],
    precision: Precision,
) -> Result<(Source<'a>, BTreeMap<String, Location>), ExportError> {
    let wrong = |source| ExportError::Weights { file, source };
    match source {
        WeightSource::Weights(weights) => {
            let layout = match precision {
                Precision::F32 => Layout::of(params),
                Precision::Bf16 => Layout::bf16(params),
            };
            let layout = layout.map_err(wrong)?;
            let found = layout.locations().clone();
            Ok((Source::Weights(layout, weights), found))
        }
        WeightSource::Same(path, entry) => {
            let found = WeightFile::open(&path).map_err(wrong)?.locations();
            Ok((Source::Same(path, entry), found))
        }
    }
}

fn reusable(earlier: &Bundle, manifest: &Manifest) -> Result<(), ExportError> {
    let old = &earlier.manifest;
    // graphs of flavour `cuda` contain the number of denoise steps
    let steps = manifest.flavour == Flavour::Plain || old.sampling.num_steps == manifest.sampling.num_steps;
    let same = [
        ("flavour", old.flavour == manifest.flavour),
        ("precision", old.precision == manifest.precision),
        ("num_steps", steps),
        ("dims", old.dims == manifest.dims),
        ("heads", old.heads == manifest.heads),
        ("weights", old.weights == manifest.weights),
        ("batch", old.batch == manifest.batch),
    ];
    match same.into_iter().find(|(_, same)| !same) {
        Some((key, _)) => Err(ExportError::Reuse {
            version: old.policy_version,
            key,
        }),
        None => Ok(()),
    }
}

fn same_layout(
    file: &'static str,
    old: &BTreeMap<String, Location>,
    new: &BTreeMap<String, Location>,
) -> Result<(), ExportError> {
    let text = |location: Option<&Location>| {
        location.map_or_else(
            || "no place".to_owned(),
            |l| format!("offset {} ({} bytes)", l.offset, l.length),
        )
    };
    match old
        .keys()
        .chain(new.keys())
        .find(|name| old.get(*name) != new.get(*name))
    {
        Some(name) => Err(ExportError::Layout {
            file,
            name: name.clone(),
            expected: text(old.get(name)),
            found: text(new.get(name)),
        }),
        None => Ok(()),
    }
}
