//! Asynchronous training: the versions that reach an update, dropped episodes, and no lost episodes.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use integration_tests::ring::{Engine, Worker, fixed_endpoint, plan};
use learner::{
    batch::RolloutBatch,
    collect::ahead::Ahead,
    model::ParamStore,
    ranks::OneRank,
    ring::{
        hub::{Hub, HubEvent},
        launch::Children,
    },
    run::{
        checkpoint::{self, MODEL},
        publish::Publisher,
        resume::Resume,
        train::train,
    },
    supervised::sft_checkpoint,
};
use policy::{
    message::told,
    noise::NoiseKey,
    params::{Heads, Part},
    plan::RunPlan,
    weights::WeightFile,
};
use tch::Device;
use wire::{
    array::Array,
    messages::{
        Batch, ChunkRecord, EngineState, FromLearner, Mode, Order, Reset, ToLearner, Trajectory, TrajectoryChunk,
    },
    socket::{DealerReceiver, DealerSender, connect_dealer},
};

use crate::common::network;

const DECOUPLED: &str = "algorithm.loss_type=\"decoupled_actor_critic\"";

/// Every record's version is within the bound, and an episode's versions only rise. Records of older versions than the version in training
/// arrive. No episode is lost although the engine is killed in the middle.
#[test]
fn records_are_within_the_bound_and_some_are_of_older_versions() {
    const BOUND: u64 = 2;
    let dir = tempfile::tempdir().expect("folder");
    // the worker finds the next engine under the address of the first
    let listen = format!("rollout.listen={:?}", fixed_endpoint());
    let overrides = [
        DECOUPLED,
        "rollout.max_staleness=2",
        "runner.max_epochs=6",
        "env.train.total_num_envs=24",
        &listen,
    ];
    let plan = plan(dir.path(), &overrides);
    let policy = network(&plan, 12);
    let hub = Hub::start("tcp://127.0.0.1:0").expect("hub");
    let mut engine = Engine::start(&plan, dir.path(), &hub.endpoint);
    let _worker = Worker::start(&engine.listen, 8);
    let mut publisher = Publisher::new(&dir.path().join("policy"), &plan, None);
    let (mut none, mut ahead) = (Children::default(), Ahead::new(0));
    let mut met = BTreeSet::new();
    for iteration in 0..plan.config.runner.max_epochs {
        let version = u64::from(iteration);
        // the learner does not wait for the engine, which continues with its version
        let bundle = publisher.publish(&policy, version).expect("bundle");
        hub.announce(&bundle).expect("announce");
        ahead.order(&hub, &plan, version).expect("orders");
        if iteration % 2 == 1 {
            ahead.evaluate(&hub, &mut none, version, 8).expect("evaluation");
        }
        if iteration == 2 {
            engine.kill();
            engine = Engine::start(&plan, dir.path(), &hub.endpoint);
        }
        let got = ahead.sample(&hub, &mut none, &plan, iteration).expect("episodes");
        let envs: BTreeSet<u32> = got.trajectories.iter().map(|t| t.reset.env).collect();
        assert_eq!((envs.len(), got.report.episodes, got.report.collect.stale), (24, 24, 0));
        for trajectory in &got.trajectories {
            assert_eq!(trajectory.reset.episode, version, "an episode of this iteration");
            let records = trajectory
                .chunks
                .iter()
                .map(|chunk| chunk.record.as_deref().expect("record"));
            let versions: Vec<u64> = records.map(|record| record.version).collect();
            assert!(versions.is_sorted(), "{versions:?}");
            for made_by in versions {
                assert!(
                    made_by <= version && version - made_by <= BOUND,
                    "{made_by} at {version}"
                );
                met.insert(version - made_by);
            }
        }
        let batch = RolloutBatch::new(&plan, got.trajectories.clone(), version, &OneRank).expect("records");
        // a chunk is one sample here
        let records = got.trajectories.iter().flat_map(|t| &t.chunks);
        let lags: Vec<u64> = records
            .map(|chunk| version - chunk.record.as_ref().expect("record").version)
            .collect();
        assert_eq!(Some(&batch.whole.staleness_max), lags.iter().max());
        let mean = lags.iter().sum::<u64>() as f64 / lags.len() as f64;
        assert!(
            (batch.whole.staleness_mean - mean).abs() < 1e-12,
            "{} {mean}",
            batch.whole.staleness_mean
        );
        assert_eq!(batch.trained_version, version + 1);
        // rejected beyond the bound
        if iteration == 5 {
            let late = RolloutBatch::new(&plan, got.trajectories, version + BOUND + 1, &OneRank);
            let error = told(&late.expect_err("refused"));
            assert!(error.contains("expected 6 to 8"), "{error}");
        }
    }
    println!("versions behind the one in training: {met:?}");
    assert!(met.iter().any(|lag| *lag > 0), "{met:?}");
}

/// An engine that the test emulates.
struct Played {
    send: DealerSender,
    receive: DealerReceiver,
}

impl Played {
    async fn connect(endpoint: &str) -> Self {
        let (send, receive) = connect_dealer(endpoint).await.expect("connecting");
        let mut played = Self { send, receive };
        let state = EngineState {
            engine: "played".to_owned(),
            version: None,
            order: None,
            slots: 1,
        };
        played.send(ToLearner::State(state)).await;
        played
    }

    async fn send(&mut self, message: ToLearner) {
        self.send.send(&message).await.expect("sending");
    }

    /// Returns the next order; skips announces and acknowledgments.
    async fn order(&mut self) -> Order {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(30), self.receive.receive::<FromLearner>());
            if let FromLearner::Order(order) = next.await.expect("an order").expect("a message") {
                return order;
            }
        }
    }
}

fn reset(env: u32) -> Reset {
    Reset {
        seed: 1,
        env,
        episode: 0,
        reset_state: None,
        task: None,
        group: None,
        video: false,
    }
}

/// Returns an episode of one chunk by `version`.
fn episode(id: u64, env: u32, version: u64) -> ToLearner {
    let empty = || Array::f32(&[0], &[]);
    let record = ChunkRecord {
        key: NoiseKey {
            seed: 1,
            env,
            episode: 0,
            chunk: 0,
        },
        version,
        images: Array::u8(&[0], Vec::new()),
        image_mask: Vec::new(),
        prompt: Vec::new(),
        prompt_mask: Vec::new(),
        state: empty(),
        denoise_steps: Vec::new(),
        chain: empty(),
        logprob: None,
        values: Vec::new(),
    };
    ToLearner::Trajectory(Box::new(Trajectory {
        id,
        engine: "played".to_owned(),
        order: 1,
        reset: reset(env),
        mode: Mode::Train,
        prompt: String::new(),
        chunks: vec![TrajectoryChunk {
            record: Some(Box::new(record)),
            rewards: vec![0.0],
            frames: Vec::new(),
        }],
        terminated: true,
        success: false,
        final_value: None,
    }))
}

/// An engine receives only new batches in addition to its orders, and all batches after a reconnect. An episode is counted and ordered
/// again whose version is too old or was never announced by this learner.
#[test]
fn an_episode_out_of_bounds_is_left_out_counted_and_ordered_again() {
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[]);
    let mut publisher = Publisher::new(&dir.path().join("policy"), &plan, None);
    let first = publisher.publish(&network(&plan, 12), 0).expect("bundle");
    let hub = Hub::start("tcp://127.0.0.1:0").expect("hub");
    hub.announce(&first).expect("announce");
    let batch = |oldest, newest, mode, env| Batch {
        oldest,
        newest,
        mode,
        resets: vec![reset(env)],
    };
    let (soon, later) = (batch(0, 1, Mode::Train, 4), batch(1, 2, Mode::Train, 5));
    let evaluation = batch(0, 0, Mode::Eval, 6);
    let event = || hub.next(Duration::from_secs(30)).expect("hub").expect("an event");
    // the sockets keep running while this thread waits for an event
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let mut engine = Played::connect(&hub.endpoint).await;
        assert!(matches!(event(), HubEvent::State(_)));
        for (wanted, first) in [(&soon, true), (&later, false), (&evaluation, false)] {
            hub.add(wanted.clone()).expect("taken");
            let order = engine.order().await;
            assert_eq!((order.replaces, order.batches), (first, vec![wanted.clone()]));
        }
        // this learner has announced no version after 0
        for (id, env, version, wanted) in [(1, 4, 1, &soon), (2, 5, 0, &later)] {
            engine.send(episode(id, env, version)).await;
            assert!(
                matches!(event(), HubEvent::Stale),
                "environment {env}, version {version}"
            );
            let order = engine.order().await;
            assert_eq!((order.replaces, order.batches), (false, vec![wanted.clone()]));
        }
        let mut next = Played::connect(&hub.endpoint).await;
        drop(engine);
        let mut order = next.order().await;
        while order.batches.len() < 3 {
            // the second engine connected before the first was found disconnected
            order = next.order().await;
        }
        assert_eq!(order.batches, [&evaluation, &soon, &later].map(Clone::clone));
        // an episode that already arrived is not accepted again, the next one is
        for id in [1, 3] {
            next.send(episode(id, 4, 0)).await;
        }
        let came = loop {
            match event() {
                HubEvent::Trajectory(trajectory) => break (trajectory.id, trajectory.reset.env),
                HubEvent::State(_) | HubEvent::Gone => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(came, (3, 4));
    });
}

/// Runs `learner train` with start weights in SFT's place, in a separate folder.
fn run(overrides: &[&str]) -> (tempfile::TempDir, RunPlan) {
    let tiny = [
        DECOUPLED,
        "rollout.max_staleness=2",
        "runner.max_epochs=5",
        "runner.save_interval=1",
        "runner.val_check_interval=2",
        "env.train.total_num_envs=8",
        "env.eval.train_episodes=8",
        "actor.global_batch_size=40",
        "actor.micro_batch_size=40",
        "actor.optim.critic_warmup_epochs=0",
        "actor.optim.lr_warmup_steps=0",
        "algorithm.update_epoch=2",
    ];
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[&tiny, overrides].concat());
    let store = ParamStore::random(&plan.dims, &Heads::default(), 77, Device::Cpu).expect("weights");
    let start = sft_checkpoint(dir.path());
    store.write(&[Part::Vlm, Part::Expert], &start).expect("start weights");
    (dir, plan)
}

/// Returns the lines of a stage of `metrics.jsonl`.
fn metrics(dir: &Path, stage: &str) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line"));
    lines.filter(|line| line["stage"] == stage).collect()
}

fn numbers(lines: &[serde_json::Value], key: &str) -> Vec<f64> {
    let number = |line: &serde_json::Value| line[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {line}"));
    lines.iter().map(number).collect()
}

/// With a learning rate of 0 all versions have the same weights, so the ratio is 1 for a record of any age.
#[test]
fn the_ratio_is_one_at_equal_weights_whatever_the_staleness() {
    let (dir, plan) = run(&["actor.optim.lr=0.0", "actor.optim.value_lr=0.0"]);
    train(&plan, None).expect("the run");
    let lines = metrics(dir.path(), "train");
    let oldest = numbers(&lines, "staleness_max");
    println!("staleness {:?}", numbers(&lines, "staleness_mean"));
    assert!(
        oldest.iter().any(|lag| *lag > 0.0) && oldest.iter().all(|lag| *lag <= 2.0),
        "{oldest:?}"
    );
    // the tolerance of `parity_ratio_is_one_at_zero_learning_rate` for two runtimes in f32
    assert!(numbers(&lines, "ratio").iter().all(|ratio| (ratio - 1.0).abs() < 1e-3));
    for key in ["clip_fraction", "behaviour_clip_fraction", "stale_dropped"] {
        assert!(numbers(&lines, key).iter().all(|share| *share == 0.0), "{key}");
    }
}

/// An asynchronous run uses every episode, makes every evaluation and ends with changed, finite weights. The run resumes from a checkpoint.
#[test]
fn an_asynchronous_run_loses_nothing_and_goes_on_from_a_checkpoint() {
    let (dir, mut plan) = run(&[]);
    plan.config.runner.max_epochs = 3;
    train(&plan, None).expect("the run");
    plan.config.runner.max_epochs = 5;
    train(&plan, Some(&Resume::Auto)).expect("going on");

    let lines = metrics(dir.path(), "train");
    assert_eq!(numbers(&lines, "step"), [1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(numbers(&lines, "episodes"), [8.0, 16.0, 24.0, 32.0, 40.0]);
    assert!(numbers(&lines, "staleness_max").iter().all(|lag| *lag <= 2.0));
    assert!(numbers(&lines, "updates").iter().all(|updates| *updates > 0.0));
    for (line, waited) in lines.iter().zip(numbers(&lines, "wait_seconds")) {
        let whole = line["iteration_seconds"].as_f64().expect("seconds");
        assert!((0.0..=whole).contains(&waited), "{line}");
    }
    let evaluations = metrics(dir.path(), "eval");
    // version 3 was the first run's last; the second run starts with an evaluation only if the interval requires one
    assert_eq!(numbers(&evaluations, "step"), [0.0, 2.0, 4.0, 5.0]);
    assert_eq!(numbers(&evaluations, "eval_episodes"), [8.0; 4]);

    let store = ParamStore::zeros(&plan.dims, &Heads::default(), Device::Cpu).expect("store");
    let read = |path: &Path| {
        let file = WeightFile::open(path).expect("weights");
        let specs = store.specs().iter().filter(|spec| spec.part == Part::Expert);
        let tensors = specs.map(|spec| file.read(spec).expect("a tensor").data);
        tensors.flatten().collect::<Vec<f32>>()
    };
    let end = read(&checkpoint::path(&dir.path().join("checkpoints"), 5).join(MODEL));
    assert!(end.iter().all(|weight| weight.is_finite()));
    assert!(end != read(&sft_checkpoint(dir.path())), "the policy was trained");
}
