//! Parity, replay and hot reload with an engine process.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use integration_tests::ring::{Client, Engine, Worker, fixed_endpoint, plan, row};
use learner::{
    batch::{RolloutBatch, observation::ObservationBatch},
    collect::{collecting::collect, sampling::sample},
    model::Pi0,
    ranks::OneRank,
    ring::{
        hub::{Hub, HubEvent},
        launch::Children,
    },
    run::publish::Publisher,
    update::Updater,
};
use policy::{
    bundle::{Bundle, MANIFEST},
    flow::Schedule,
    noise::{Purpose, fill_normal, stream},
    params::Part,
    plan::RunPlan,
};
use tch::{Kind, Tensor};
use wire::messages::{ActRow, ChunkRecord, FromEngine, Mode, Reset, ToEngine};

use crate::common::network;

/// Perturbs the trained weights, so that versions differ visibly.
fn perturb(policy: &Pi0, version: u64) {
    for part in [Part::Expert, Part::ValueHead] {
        for (index, (name, shape, mut data)) in policy.store().export(part).into_iter().enumerate() {
            let mut noise = vec![0.0f32; shape.iter().product()];
            fill_normal(
                &mut stream(Purpose::Init, version, index as u64, part as u64, 7),
                &mut noise,
            );
            data.iter_mut().zip(&noise).for_each(|(w, n)| *w += 0.02 * n);
            policy.store().assign(&name, &data).expect("same shape");
        }
    }
}

/// A hub, an engine that serves version 0 of random weights, and a publisher of further versions.
pub(crate) struct Ring {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) plan: RunPlan,
    pub(crate) policy: Pi0,
    pub(crate) hub: Hub,
    pub(crate) engine: Engine,
    publisher: Publisher,
}

impl Ring {
    pub(crate) fn start(overrides: &[&str], seed: u64) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let plan = plan(dir.path(), overrides);
        let policy = network(&plan, seed);
        let hub = Hub::start("tcp://127.0.0.1:0").expect("hub");
        let engine = Engine::start(&plan, dir.path(), &hub.endpoint);
        let publisher = Publisher::new(&dir.path().join("policy"), &plan, None);
        let mut ring = Self {
            dir,
            plan,
            policy,
            hub,
            engine,
            publisher,
        };
        ring.publish(0);
        ring
    }

    /// Publishes the current weights as this version and waits until the engine serves the version.
    fn publish(&mut self, version: u64) {
        let bundle = self.publisher.publish(&self.policy, version).expect("bundle");
        self.hub.announce(&bundle).expect("announce");
        wait_live(&self.hub, version);
    }
}

fn wait_live(hub: &Hub, version: u64) {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_mins(1) {
        if let Some(HubEvent::Reload(report)) = hub.next(Duration::from_millis(100)).expect("hub")
            && report.version == version
        {
            assert_eq!(report.refused, None, "version {version}");
            return;
        }
    }
    panic!("version {version} did not go live");
}

fn resets(count: u32, seed: u64) -> Vec<Reset> {
    (0..count)
        .map(|env| Reset {
            seed,
            env,
            episode: 0,
            reset_state: None,
            task: None,
            group: None,
            video: false,
        })
        .collect()
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
        .block_on(future)
}

const VLM: &[&str] = &[
    "actor.model.value_head.input=\"vlm\"",
    "actor.model.value_head.state=true",
];
const EXPERT: &[&str] = &[
    "actor.model.value_head.input=\"expert\"",
    "actor.model.value_head.state=false",
];
const FLOW_NOISE: &[&str] = &[
    "actor.model.openpi.noise_method=\"flow_noise\"",
    "actor.model.openpi.noise_head={hidden=[16,8],std_range=[0.08,0.16]}",
];
const JOINT_SUM: &[&str] = &[
    "actor.model.openpi.mdp=\"joint\"",
    "actor.model.openpi.joint_logprob=\"sum\"",
];
const JOINT_MEAN: &[&str] = &[
    "actor.model.openpi.mdp=\"joint\"",
    "actor.model.openpi.joint_logprob=\"mean\"",
];
const TWO_LAYER: &[&str] = &["actor.model.openpi.mdp=\"two_layer\""];
const PATH: &[&str] = &["actor.model.value_head.steps=\"path\""];
const CHUNK: &[&str] = &["actor.model.value_head.chunk_critic_input=true"];
const CPS: &[&str] = &["actor.model.openpi.noise_method=\"flow_cps\""];
const ANNEAL: &[&str] = &["actor.model.openpi.noise_anneal={start=0.7,end=0.3,steps=10}"];
const LAST: &[&str] = &[
    "actor.model.value_head.pooling=\"last\"",
    "actor.model.openpi.safe_get_logprob=true",
];

/// At equal weights the learner's ratio is 1 and its values are the recorded ones, for every critic, noise method and MDP.
#[test]
fn parity_ratio_is_one_at_zero_learning_rate() {
    let cases: [(&str, &[&[&str]]); 10] = [
        ("hybrid, V_vlm with the state", &[VLM]),
        ("hybrid, V_expert", &[EXPERT]),
        ("hybrid, V_expert over the path", &[EXPERT, PATH]),
        (
            "hybrid, Flow-CPS, V_expert of the executed tokens",
            &[EXPERT, CHUNK, CPS],
        ),
        ("hybrid, annealed, safe, V_vlm of the last slot", &[VLM, ANNEAL, LAST]),
        ("joint sum, V_expert", &[EXPERT, JOINT_SUM]),
        (
            "joint mean, Flow-Noise, V_expert over the path",
            &[EXPERT, PATH, FLOW_NOISE, JOINT_MEAN],
        ),
        ("joint sum, Flow-Noise, V_vlm", &[VLM, FLOW_NOISE, JOINT_SUM]),
        ("two-layer, V_expert", &[EXPERT, TWO_LAYER]),
        ("two-layer, Flow-Noise, V_vlm", &[VLM, TWO_LAYER, FLOW_NOISE]),
    ];
    for (name, parts) in cases {
        let overrides: Vec<&str> = parts
            .iter()
            .flat_map(|p| p.iter().copied())
            .chain([
                "actor.optim.lr=0.0",
                "actor.optim.value_lr=0.0",
                "actor.optim.critic_warmup_epochs=0",
                "algorithm.update_epoch=1",
                "actor.global_batch_size=4096",
                "actor.micro_batch_size=256",
            ])
            .collect();
        let ring = Ring::start(&overrides, 3);
        let _worker = Worker::start(&ring.engine.listen, 64);
        let mut none = Children::default();
        let got = collect(&ring.hub, &mut none, 0, Mode::Train, resets(64, 1), "parity").expect("episodes");
        let batch = RolloutBatch::new(&ring.plan, got.trajectories, 0, &OneRank).expect("records");
        assert!(batch.len() >= 500, "{} records", batch.len());
        let report = Updater::new(&ring.plan, &ring.policy, &OneRank)
            .expect("optimizer")
            .update(&batch, 0)
            .expect("update");
        println!(
            "{name}, {} samples: largest |ratio - 1| {:.2e}, |value gap| {:.2e}",
            batch.len(),
            report.first_ratio_deviation,
            report.first_value_gap
        );
        assert!(report.first_ratio_deviation < 1e-3, "{}", report.first_ratio_deviation);
        assert!(report.actor.clip_fraction == 0.0, "{}", report.actor.clip_fraction);
        assert!(report.first_value_gap < 1e-4, "{}", report.first_value_gap);
    }
}

/// Episodes of a group share only start and task. A group out of bounds is ordered again, at most the allowed number of times.
#[test]
fn groups_out_of_bounds_are_sampled_again() {
    let overrides = [
        "env.train.total_num_envs=16",
        "algorithm.group_size=4",
        "algorithm.filter_rewards={lower=2.0,upper=3.0,mode=\"resample\",max_rounds=3}",
    ];
    let mut ring = Ring::start(&overrides, 6);
    let _worker = Worker::start(&ring.engine.listen, 16);
    let mut none = Children::default();
    let got = sample(&ring.hub, &mut none, &ring.plan, 0, 0).expect("episodes");
    // no episode of the tabletop scores 2
    let counts = (
        got.report.rounds,
        got.report.groups,
        got.report.episodes,
        got.trajectories.len(),
    );
    assert_eq!(counts, (3, 0, 48, 0));
    let filter = ring.plan.config.algorithm.filter_rewards.as_mut().expect("filter");
    (filter.lower, filter.upper) = (0.0, 1.0);
    let got = sample(&ring.hub, &mut none, &ring.plan, 1, 0).expect("episodes");
    assert_eq!((got.report.rounds, got.report.groups, got.report.episodes), (1, 4, 16));
    let mut starts = BTreeMap::new();
    for trajectory in &got.trajectories {
        let first = trajectory.chunks[0].record.as_deref().expect("record");
        let group: &mut Vec<_> = starts.entry(trajectory.reset.reset_state).or_default();
        group.push((&first.images, &first.prompt, &first.state, &first.chain));
    }
    assert_eq!(starts.len(), 4);
    for group in starts.values() {
        assert_eq!(group.len(), 4);
        for other in &group[1..] {
            assert_eq!(
                (group[0].0, group[0].1, group[0].2),
                (other.0, other.1, other.2),
                "one start"
            );
            assert_ne!(group[0].3, other.3, "each its own noise");
        }
    }
    let images: Vec<_> = starts.values().map(|group| group[0].0).collect();
    assert!(
        images.windows(2).all(|pair| pair[0] != pair[1]),
        "each group its own start"
    );
}

pub(crate) fn record(reply: &wire::messages::ActReply, row: usize) -> &ChunkRecord {
    reply.rows[row].record.as_ref().expect("record")
}

/// The same key gives the same noise bit for bit in any batch. Actions are equal bit for bit in a batch of the same size, and within 1e-5
/// in another (matrix products sum in another order).
#[test]
fn replay_reproduces_a_recorded_chunk() {
    let Ring {
        plan,
        engine,
        hub: _hub,
        dir: _dir,
        ..
    } = Ring::start(&[], 4);
    let elements = plan.dims.action_horizon * plan.dims.action_dim;
    block_on(async {
        let mut client = Client::connect(&engine.listen).await;
        let others: Vec<ActRow> = (1..7).map(|n| row(&plan, n, Mode::Train)).collect();
        let alone = client.act(1, vec![row(&plan, 0, Mode::Train)]).await;
        let again = client.act(2, vec![row(&plan, 0, Mode::Train)]).await;
        let crowd = client
            .act(3, others.iter().cloned().chain([row(&plan, 0, Mode::Train)]).collect())
            .await;
        let last = crowd.rows.len() - 1;
        assert_eq!(record(&alone, 0), record(&again, 0), "same batch size: every bit");
        let noise = |r: &ChunkRecord| r.chain.data[..elements * 4].to_vec();
        assert_eq!(
            noise(record(&alone, 0)),
            noise(record(&crowd, last)),
            "noise in another batch: every bit"
        );
        assert_eq!(record(&alone, 0).denoise_steps, record(&crowd, last).denoise_steps);
        let actions =
            |r: &wire::messages::ActReply, i: usize| r.rows[i].actions.to_f32("actions", None).expect("actions");
        let gap = actions(&alone, 0)
            .iter()
            .zip(actions(&crowd, last))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0f32, f32::max);
        println!(
            "largest action difference between a batch of 1 and of {}: {gap:.2e}",
            last + 1
        );
        assert!(gap <= 1e-5, "{gap}");
    });
}

/// Recomputes the final actions of a record with the weights of its version.
fn recompute(plan: &RunPlan, policy: &Pi0, record: &ChunkRecord) -> Vec<f32> {
    let dims = &plan.dims;
    let (side, cameras) = (dims.vision.image_size as i64, dims.cameras as i64);
    let observation = ObservationBatch {
        images: Tensor::from_slice(&record.images.data).view([1, cameras, side, side, 3]),
        image_mask: Tensor::from_slice(&record.image_mask).view([1, cameras]),
        prompt: Tensor::from_slice(&record.prompt).view([1, -1]),
        prompt_mask: Tensor::from_slice(&record.prompt_mask).view([1, -1]),
        state: Tensor::from_slice(&record.state.to_f32("state", None).expect("state")).view([1, -1]),
    };
    let (cache, _) = observation.frozen_prefix(policy, 1).expect("prefix");
    let shape = [1, dims.action_horizon as i64, dims.action_dim as i64];
    let chain = record.chain.to_f32("chain", None).expect("chain");
    let noise = Tensor::from_slice(&chain[..dims.action_horizon * dims.action_dim]).view(shape);
    let sample = policy
        .sample(
            &cache,
            Some(&observation.state),
            &noise,
            &Schedule::of(&plan.sampling(0)),
            &[],
        )
        .expect("sample");
    let mut out = vec![0.0f32; dims.action_horizon * dims.action_dim];
    let len = out.len();
    sample
        .actions
        .to_kind(Kind::Float)
        .contiguous()
        .copy_data(&mut out, len);
    out
}

const EPISODES: u32 = 48;
const REQUESTS_PER_CLIENT: u64 = 250;
const CLIENTS: u64 = 4;
const VERSIONS: u64 = 20;

/// 1,000 requests from 4 clients while 20 versions are published: no request fails, no reply mixes versions, and a damaged bundle is
/// rejected while the old version continues to serve.
#[test]
fn reload_under_load_loses_and_mixes_nothing() {
    let Ring {
        dir: _dir,
        plan,
        policy,
        hub,
        engine,
        mut publisher,
    } = Ring::start(&[], 5);
    let mut weights = BTreeMap::from([(0, policy.store().export(Part::Expert))]);

    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (listen, plan) = (engine.listen.clone(), plan.clone());
            std::thread::spawn(move || {
                block_on(async {
                    let mut connection = Client::connect(&listen).await;
                    let mut replies = Vec::new();
                    for request in 0..REQUESTS_PER_CLIENT {
                        let number = client * REQUESTS_PER_CLIENT + request;
                        let rows = vec![
                            row(&plan, 2 * number, Mode::Eval),
                            row(&plan, 2 * number + 1, Mode::Eval),
                        ];
                        replies.push(connection.act(number, rows).await);
                    }
                    replies
                })
            })
        })
        .collect();
    for version in 1..=VERSIONS {
        perturb(&policy, version);
        weights.insert(version, policy.store().export(Part::Expert));
        hub.announce(&publisher.publish(&policy, version).expect("bundle"))
            .expect("announce");
        wait_live(&hub, version);
    }
    let replies: Vec<_> = clients.into_iter().flat_map(|c| c.join().expect("client")).collect();
    assert_eq!(replies.len() as u64, CLIENTS * REQUESTS_PER_CLIENT);

    let seen: std::collections::BTreeSet<u64> = replies.iter().map(|r| r.version).collect();
    println!("{} replies from {} versions", replies.len(), seen.len());
    assert!(seen.len() >= 3, "the load met {} versions only", seen.len());
    let mut worst = 0.0f32;
    for (version, tensors) in &weights {
        for (name, _, data) in tensors {
            policy.store().assign(name, data).expect("same shape");
        }
        // a few replies of each version: this version must have made every row from the first denoise step to the last
        for reply in replies.iter().filter(|r| r.version == *version).take(6) {
            for acted in &reply.rows {
                let record = acted.record.as_ref().expect("record");
                assert_eq!(record.version, *version);
                let chain = record.chain.to_f32("chain", None).expect("chain");
                let want = recompute(&plan, &policy, record);
                let got = &chain[chain.len() - want.len()..];
                worst = want.iter().zip(got).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
            }
        }
    }
    println!("largest difference from the version that a reply names: {worst:.2e}");
    assert!(worst < 1e-4, "a reply is not its version's work: {worst}");

    // a damaged bundle: one byte of the weights flipped after the manifest was written
    perturb(&policy, 99);
    let damaged = publisher.publish(&policy, VERSIONS + 1).expect("bundle");
    let file = damaged.path(policy::bundle::EXPERT_WEIGHTS);
    let mut bytes = std::fs::read(&file).expect("weights");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&file, &bytes).expect("damaging the weights");
    hub.announce(&damaged).expect("announce");
    let reason = loop {
        if let Some(HubEvent::Reload(report)) = hub.next(Duration::from_secs(30)).expect("hub") {
            assert_eq!(report.version, VERSIONS + 1);
            break report.refused.expect("refused");
        }
    };
    assert!(
        reason.contains("expert.safetensors") && reason.contains("sha256"),
        "{reason}"
    );
    block_on(async {
        let mut client = Client::connect(&engine.listen).await;
        assert_eq!(
            client.act(1, vec![row(&plan, 1, Mode::Eval)]).await.version,
            VERSIONS,
            "the old version serves on"
        );
    });
}

/// Returns the reason for which a version is rejected.
fn rejected(hub: &Hub, version: u64) -> String {
    loop {
        match hub.next(Duration::from_secs(30)).expect("hub") {
            Some(HubEvent::Reload(report)) => {
                assert_eq!(report.version, version);
                return report.refused.unwrap_or_else(|| panic!("version {version} went live"));
            }
            Some(_) => {}
            None => panic!("no report of version {version}"),
        }
    }
}

/// A change of a manifest.
type Change<'a> = &'a dyn Fn(&mut serde_json::Value);

/// A version may change weights and the noise level, never the meaning of an observation or an action.
#[test]
fn a_version_that_means_something_else_is_rejected() {
    let ring = Ring::start(&[], 12);
    let own: serde_json::Value = {
        let path = ring.publisher.path(0).join(MANIFEST);
        serde_json::from_str(&std::fs::read_to_string(path).expect("manifest")).expect("JSON")
    };
    let change = |version: u64, change: Change<'_>| {
        let dir = ring.dir.path().join(format!("changed/v{version}"));
        std::fs::create_dir_all(&dir).expect("folder");
        for file in std::fs::read_dir(ring.publisher.path(0)).expect("bundle") {
            let path = file.expect("file").path();
            std::fs::copy(&path, dir.join(path.file_name().expect("name"))).expect("copied");
        }
        let mut manifest = own.clone();
        manifest["policy_version"] = version.into();
        change(&mut manifest);
        std::fs::write(dir.join(MANIFEST), manifest.to_string()).expect("manifest");
        Bundle::open(&dir).expect("a bundle that is sound by itself")
    };
    let width = ring.plan.dims.action_dim;
    let stats = |scale: f64| {
        let row = |value: f64| vec![value; width];
        let dims = serde_json::json!({ "mean": row(0.0), "std": row(scale), "q01": row(-scale), "q99": row(scale) });
        serde_json::json!({ "state": dims, "actions": dims })
    };
    let words = |manifest: &mut serde_json::Value| {
        let words = manifest["tokenizer"]["words"].as_array_mut().expect("a list of words");
        words.reverse();
    };
    let cases: [(&str, Change<'_>); 6] = [
        ("norm_stats", &|manifest| manifest["norm_stats"] = stats(244.0)),
        ("normalization", &|manifest| {
            manifest["normalization"] = "z_score".into();
            manifest["norm_stats"] = stats(1.0);
        }),
        ("tokenizer", &words),
        ("cameras", &|manifest| manifest["cameras"][0] = "other".into()),
        ("sampling", &|manifest| manifest["sampling"]["num_steps"] = 7.into()),
        ("delta_actions", &|manifest| manifest["delta_actions"] = vec![1].into()),
    ];
    for (version, (field, changed)) in (1..).zip(cases) {
        ring.hub.announce(&change(version, changed)).expect("announce");
        let reason = rejected(&ring.hub, version);
        assert!(
            reason.contains(&format!("`{field}` differs from the live version")),
            "{field}: {reason}"
        );
    }
    // the noise level is the schedule of an annealed run
    let level = change(7, &|manifest| manifest["sampling"]["noise_level"] = 0.125.into());
    ring.hub.announce(&level).expect("announce");
    wait_live(&ring.hub, 7);
}

/// The engine rejects invalid requests with one clear line, and continues to serve.
#[test]
fn refuses_what_it_cannot_serve() {
    let Ring {
        plan,
        engine,
        hub: _hub,
        dir: _dir,
        ..
    } = Ring::start(&[], 6);
    let refused = |message: FromEngine| match message {
        FromEngine::Refused(refusal) => refusal.reason,
        other => panic!("expected a refusal, got {other:?}"),
    };
    block_on(async {
        let mut client = Client::connect(&engine.listen).await;
        let mut bad = row(&plan, 0, Mode::Eval);
        bad.observation.prompt = "juggle red".to_owned();
        client
            .send(&ToEngine::Act(wire::messages::ActRequest {
                request: 1,
                rows: vec![bad],
            }))
            .await;
        let reason = refused(client.receive().await);
        assert!(reason.contains("juggle"), "{reason}");
        let mut bad = row(&plan, 0, Mode::Eval);
        bad.observation.state = vec![f32::NAN; 4];
        client
            .send(&ToEngine::Act(wire::messages::ActRequest {
                request: 2,
                rows: vec![bad],
            }))
            .await;
        let reason = refused(client.receive().await);
        assert!(reason.contains("state"), "{reason}");
        assert_eq!(
            client.act(3, vec![row(&plan, 0, Mode::Eval)]).await.rows.len(),
            1,
            "and it serves on"
        );
    });
    // bytes that are not a message
    block_on(async {
        use zeromq::{Socket, SocketRecv, SocketSend};
        let mut raw = zeromq::DealerSocket::new();
        raw.connect(&engine.listen).await.expect("connecting");
        raw.send(zeromq::ZmqMessage::from(vec![1u8, 2, 3]))
            .await
            .expect("sending");
        let answer = tokio::time::timeout(Duration::from_secs(30), raw.recv())
            .await
            .expect("an answer")
            .expect("answer");
        let frame = answer.into_vec().pop().expect("frame");
        let reason = refused(wire::codec::decode(&frame).expect("a refusal"));
        assert!(reason.contains("shorter than the header"), "{reason}");
    });
}

/// The env worker waits for a vanished engine and continues with the next engine under the same address. The learner receives every episode
/// of its order once.
#[test]
fn episodes_outlive_the_engine() {
    let listen = format!("rollout.listen={:?}", fixed_endpoint());
    let mut ring = Ring::start(&[&listen], 7);
    let _worker = Worker::start(&ring.engine.listen, 8);
    ring.hub.order(0, Mode::Train, resets(EPISODES, 2)).expect("order");
    let mut got = BTreeMap::new();
    let mut killed = false;
    let begin = Instant::now();
    while got.len() < EPISODES as usize {
        assert!(
            begin.elapsed() < Duration::from_mins(2),
            "{} of {EPISODES} episodes came",
            got.len()
        );
        let Some(HubEvent::Trajectory(trajectory)) = ring.hub.next(Duration::from_millis(100)).expect("hub") else {
            continue;
        };
        let steps: usize = trajectory.chunks.iter().map(|c| c.rewards.len()).sum();
        assert!(
            got.insert(trajectory.reset.env, steps).is_none(),
            "an episode came twice"
        );
        if !killed {
            // SIGKILL sends no message; the next engine starts without a policy and fetches one from the learner
            ring.engine.kill();
            ring.engine = Engine::start(&ring.plan, ring.dir.path(), &ring.hub.endpoint);
            killed = true;
        }
    }
    assert!(got.values().all(|steps| *steps > 0));
}

/// Without a learner the engine continues to serve. A learner that restarts under the same address is found, and its version goes live.
#[test]
fn serving_outlives_the_learner() {
    let endpoint = fixed_endpoint();
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[]);
    let policy = network(&plan, 8);
    let mut publisher = Publisher::new(&dir.path().join("policy"), &plan, None);
    let hub = Hub::start(&endpoint).expect("hub");
    let engine = Engine::start(&plan, dir.path(), &hub.endpoint);
    hub.announce(&publisher.publish(&policy, 0).expect("bundle"))
        .expect("announce");
    wait_live(&hub, 0);
    let version = || {
        block_on(async {
            let mut client = Client::connect(&engine.listen).await;
            client.act(1, vec![row(&plan, 0, Mode::Eval)]).await.version
        })
    };
    drop(hub);
    assert_eq!(version(), 0, "served without a learner");
    perturb(&policy, 1);
    let begin = Instant::now();
    let hub = loop {
        match Hub::start(&endpoint) {
            Ok(hub) => break hub,
            Err(error) => assert!(begin.elapsed() < Duration::from_secs(30), "{error}"),
        }
    };
    hub.announce(&publisher.publish(&policy, 1).expect("bundle"))
        .expect("announce");
    wait_live(&hub, 1);
    assert_eq!(version(), 1);
}

/// On SIGTERM pending requests are answered, finished episodes reach the learner, and the engine ends with success.
#[test]
fn sigterm_answers_and_flushes() {
    let mut ring = Ring::start(&[], 9);
    let _worker = Worker::start(&ring.engine.listen, 8);
    ring.hub.order(0, Mode::Train, resets(8, 3)).expect("order");
    let begin = Instant::now();
    while !matches!(
        ring.hub.next(Duration::from_millis(100)).expect("hub"),
        Some(HubEvent::Trajectory(_))
    ) {
        assert!(begin.elapsed() < Duration::from_mins(1), "no episode came");
    }
    block_on(async {
        let mut client = Client::connect(&ring.engine.listen).await;
        for request in 0..20 {
            let rows = vec![row(&ring.plan, request, Mode::Eval)];
            client
                .send(&ToEngine::Act(wire::messages::ActRequest { request, rows }))
                .await;
        }
        // after the first answer the engine has read the socket
        let first = client.receive().await;
        assert!(matches!(first, FromEngine::Acted(_)), "{first:?}");
        learner::ring::native::terminate(ring.engine.pid());
    });
    assert!(ring.engine.wait(), "{}", Engine::log(ring.dir.path()));
    let log = Engine::log(ring.dir.path());
    assert!(log.contains("left") && !log.contains("not acknowledged"), "{log}");
}
