//! Whatever happens, in whatever order: when it is over, reader = store = what is wanted.

use std::{collections::BTreeSet, time::Duration};

use proptest::prelude::*;
use registry_core::{Directory, Key, Options, Registry, memory::MemoryStore};
use tokio::time::sleep;

use super::*;

const PROCESSES: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Register {
        process: usize,
        id: u8,
        weight: u32,
    },
    Unregister {
        process: usize,
        id: u8,
    },
    /// The call is given up at once; what it wants stands.
    RegisterAndLeave {
        process: usize,
        id: u8,
    },
    Heartbeat {
        process: usize,
    },
    Cut {
        process: usize,
    },
    Hang {
        process: usize,
    },
    Silence {
        process: usize,
    },
    Heal {
        process: usize,
    },
    Crash {
        process: usize,
    },
    ExpireAll,
    Delete {
        id: u8,
    },
    Garbage {
        id: u8,
    },
    Wipe,
    Compact,
    Wait {
        ms: u64,
    },
}

fn steps() -> impl Strategy<Value = Step> {
    let process = 0..PROCESSES;
    let id = 0u8..4;
    prop_oneof![
        4 => (process.clone(), id.clone(), 1u32..4).prop_map(|(process, id, weight)| Step::Register { process, id, weight }),
        2 => (process.clone(), id.clone()).prop_map(|(process, id)| Step::Unregister { process, id }),
        1 => (process.clone(), id.clone()).prop_map(|(process, id)| Step::RegisterAndLeave { process, id }),
        1 => process.clone().prop_map(|process| Step::Heartbeat { process }),
        1 => process.clone().prop_map(|process| Step::Cut { process }),
        1 => process.clone().prop_map(|process| Step::Hang { process }),
        1 => process.clone().prop_map(|process| Step::Silence { process }),
        3 => process.clone().prop_map(|process| Step::Heal { process }),
        1 => process.prop_map(|process| Step::Crash { process }),
        1 => Just(Step::ExpireAll),
        1 => id.clone().prop_map(|id| Step::Delete { id }),
        1 => id.prop_map(|id| Step::Garbage { id }),
        1 => Just(Step::Wipe),
        1 => Just(Step::Compact),
        4 => (1u64..20_000).prop_map(|ms| Step::Wait { ms }),
    ]
}

struct World {
    store: MemoryStore,
    processes: Vec<Process>,
    reader: Process,
}

impl World {
    async fn new() -> Self {
        let store = MemoryStore::new();
        let processes = (0..PROCESSES).map(|_| Process::start(&store)).collect();
        let reader = Process::with(&store, Options::default());
        reader.watch("orders").await;
        Self { store, processes, reader }
    }

    async fn step(&mut self, step: &Step) {
        let name = |id: &u8| format!("i{id}");
        match step {
            Step::Register { process, id, weight } => {
                let mut instance = instance("orders", &name(id));
                instance.weight = *weight;
                let _ = self.processes[*process].registry.register(instance).await;
            }
            Step::Unregister { process, id } => {
                let _ = self.processes[*process].registry.unregister("orders", &name(id)).await;
            }
            Step::RegisterAndLeave { process, id } => {
                use futures::FutureExt;
                let _ = self.processes[*process].registry.register(instance("orders", &name(id))).now_or_never();
            }
            Step::Heartbeat { process } => drop(self.processes[*process].registry.heartbeat().await),
            Step::Cut { process } => self.processes[*process].link.cut(),
            Step::Hang { process } => self.processes[*process].link.hang(),
            Step::Silence { process } => self.processes[*process].link.hang_after_apply(),
            Step::Heal { process } => self.processes[*process].link.heal(),
            Step::Crash { process } => {
                std::mem::replace(&mut self.processes[*process], Process::start(&self.store)).crash();
            }
            Step::ExpireAll => self.store.expire_all(),
            Step::Delete { id } => drop(self.store.delete(&provider(&name(id)))),
            Step::Garbage { id } => self.store.put_raw(&format!("orders/providers/{}", name(id)), b"{nonsense"),
            Step::Wipe => self.store.wipe(),
            Step::Compact => self.store.compact(),
            Step::Wait { ms } => sleep(Duration::from_millis(*ms)).await,
        }
    }

    /// Heals everything and waits as long as any promise may take.
    async fn settle(&self) {
        self.processes.iter().chain([&self.reader]).for_each(|process| process.link.heal());
        // The check finds deleted keys, the older of two owners waits until a key was absent for a ttl at two checks,
        // and protection lets go.
        sleep(Duration::from_secs(200)).await;
    }

    fn wanted(&self) -> BTreeSet<String> {
        self.processes.iter().flat_map(|process| process.registry.registrations()).map(|r| r.id().to_string()).collect()
    }

    /// The store's good records by id, with who owns each.
    async fn stored(&self) -> Vec<(String, String, u32)> {
        use registry_core::{Backend, Content};
        let records =
            self.reader.registry.backend().list(&"orders".parse().unwrap(), Directory::Providers).await.unwrap();
        let mut all: Vec<_> = records
            .into_iter()
            .filter_map(|record| match record.content {
                Content::Instance(instance) => {
                    Some((record.key.id.to_string(), record.owner.to_string(), instance.weight))
                }
                _ => None,
            })
            .collect();
        all.sort();
        all
    }
}

fn provider(id: &str) -> Key {
    Key::provider("orders".parse().unwrap(), id.parse().unwrap())
}

async fn converges(steps: Vec<Step>) -> Result<(), TestCaseError> {
    use registry_core::Backend;
    let mut world = World::new().await;
    for step in &steps {
        world.step(step).await;
    }
    world.settle().await;
    let stored = world.stored().await;
    let ids: BTreeSet<String> = stored.iter().map(|(id, ..)| id.clone()).collect();
    prop_assert_eq!(&ids, &world.wanted(), "store = wanted");
    let seen: Vec<(String, u32)> = world
        .reader
        .registry
        .discover("orders")
        .await
        .unwrap()
        .instances()
        .iter()
        .map(|instance| (instance.id.to_string(), instance.weight))
        .collect();
    let there: Vec<(String, u32)> = stored.iter().map(|(id, _, weight)| (id.clone(), *weight)).collect();
    prop_assert_eq!(seen, there, "reader = store");
    for process in &world.processes {
        let me = process.registry.backend().owner().to_string();
        for registration in process.registry.registrations() {
            let id = registration.id().to_string();
            let ours = stored.contains(&(id.clone(), me.clone(), registration.instance.weight));
            prop_assert_eq!(registration.state.is_registered(), ours, "{}: {:?}", id, registration.state);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_with_reader_and_store_as_wanted(steps in proptest::collection::vec(steps(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(converges(steps))?;
    }
}
