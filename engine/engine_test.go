package engine_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const mib = 1 << 20

// rig is a node's data directory with what outlives its daemon.
type rig struct {
	t      *testing.T
	dir    string
	fake   *enginetest.Fake
	r      *reactor.Reactor
	config engine.Config
	e      *engine.Engine // nil while it is closed
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.CheckFDs(t)
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	r, err := reactor.Start(reactor.Config{Engine: reactor.EngineEpoll, Poll: reactor.PollOff, BufferBytes: 4 * mib, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t, dir: filepath.Join(t.TempDir(), "node"), fake: &enginetest.Fake{}, r: r}
	g.config = engine.Config{DataDir: g.dir, Reactors: []*reactor.Reactor{r}, Log: log, Layout: g.fake}
	t.Cleanup(func() {
		g.close()
		r.Stop()
		if err := g.fake.Close(); err != nil {
			t.Error(err)
		}
	})
	return g.open()
}

func (g *rig) open() *rig {
	g.t.Helper()
	e, err := engine.Open(g.config)
	if err != nil {
		g.t.Fatal(err)
	}
	g.e = e
	return g
}

func (g *rig) close() {
	g.t.Helper()
	if g.e != nil {
		if err := g.e.Close(); err != nil {
			g.t.Error(err)
		}
		g.e = nil
	}
}

func (g *rig) restart() { g.t.Helper(); g.close(); g.open() }

func (g *rig) path(name string) string { return filepath.Join(filepath.Dir(g.dir), name) }

// pool makes a pool of one file.
func (g *rig) pool(name string) engine.PoolInfo {
	g.t.Helper()
	i, err := g.e.CreatePool(engine.PoolSpec{Name: name, Size: 8 * mib})
	if err != nil {
		g.t.Fatal(err)
	}
	return i
}

func (g *rig) volume(ref string) {
	g.t.Helper()
	if _, err := g.e.CreateVolume("", pool.VolumeSpec{Name: ref, Size: mib}); err != nil {
		g.t.Fatal(err)
	}
}

// states is what Pools says, for comparing.
func (g *rig) states() string {
	var list []string
	for _, i := range g.e.Pools() {
		list = append(list, i.Name+":"+string(i.State))
	}
	return strings.Join(list, " ")
}

func (g *rig) wantStates(want string) {
	g.t.Helper()
	if got := g.states(); got != want {
		g.t.Errorf("pools %q, want %q", got, want)
	}
}

func wantError(t *testing.T, what string, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v, want a word about %q", what, err, word)
		}
	}
}

func TestPoolsAreThereAfterARestart(t *testing.T) {
	g := newRig(t)
	if !g.e.Fresh() {
		t.Error("a new data directory is not fresh")
	}
	i := g.pool("a")
	if len(i.Devices) != 1 || i.Devices[0].Path != filepath.Join(g.dir, "pools", "a.img") || !i.Devices[0].Present || i.Devices[0].Access == "" {
		t.Errorf("%+v", i.Devices)
	}
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "b", Paths: []string{g.path("b1"), g.path("b2")}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.volume("b/v")
	g.restart()
	g.wantStates("a:online b:online")
	if g.e.Fresh() {
		t.Error("fresh after a pool was made")
	}
	if v, err := g.e.Volume("v"); err != nil || v.Pool != "b" {
		t.Errorf("%+v, %v", v, err)
	}
	files, err := filepath.Glob(g.path("*") + "*ashlar-new")
	if err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

func TestCreatePoolRefuses(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	file, foreign := g.path("file"), g.path("foreign")
	if err := errors.Join(os.WriteFile(file, make([]byte, 8*mib), 0o600), os.WriteFile(foreign, slices.Repeat([]byte("ext4"), 2*mib), 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spec  engine.PoolSpec
		want  error
		words string
	}{
		"a name twice":      {engine.PoolSpec{Name: "a", Size: 8 * mib}, pool.ErrExists, "a"},
		"no name":           {engine.PoolSpec{Size: 8 * mib}, pool.ErrInvalid, "empty"},
		"a name with slash": {engine.PoolSpec{Name: "../a", Size: 8 * mib}, pool.ErrInvalid, "letters"},
		"a name with at":    {engine.PoolSpec{Name: "a@b", Size: 8 * mib}, pool.ErrInvalid, "letters"},
		"nothing":           {engine.PoolSpec{Name: "b"}, pool.ErrInvalid, "neither"},
		"file that is not":  {engine.PoolSpec{Name: "b", Paths: []string{g.path("none")}}, pool.ErrNotFound, "give a size"},
		"file that is":      {engine.PoolSpec{Name: "b", Paths: []string{file}, Size: 8 * mib}, pool.ErrExists, file},
		"of an open pool":   {engine.PoolSpec{Name: "b", Paths: []string{filepath.Join(g.dir, "pools", "a.img")}, Force: true}, pool.ErrInUse, "pool a"},
		"a path twice":      {engine.PoolSpec{Name: "b", Paths: []string{file, file}}, pool.ErrInvalid, "twice"},
		"a new path twice":  {engine.PoolSpec{Name: "b", Paths: []string{g.path("n"), g.path("n")}, Size: mib}, pool.ErrInvalid, "twice"},
		"too large":         {engine.PoolSpec{Name: "b", Size: 1 << 62}, pool.ErrNoSpace, "whole filesystem"},
		"foreign":           {engine.PoolSpec{Name: "b", Paths: []string{g.path("new"), foreign}, Size: 0}, pool.ErrNotFound, "new"},
		"foreign alone":     {engine.PoolSpec{Name: "b", Paths: []string{foreign}}, pool.ErrForeign, foreign},
	} {
		_, err := g.e.CreatePool(c.spec)
		wantError(t, name, err, c.want, c.words)
	}
	g.wantStates("a:online")
	for _, name := range []string{"none", "n", "new"} {
		for _, suffix := range []string{"", ".ashlar-new"} {
			if _, err := os.Stat(g.path(name) + suffix); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s%s was left: %v", name, suffix, err)
			}
		}
	}
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "b", Paths: []string{foreign}, Force: true}); err != nil {
		t.Errorf("forced: %v", err)
	}
}

func TestADeviceThatMovedIsFoundByItsSignature(t *testing.T) {
	g := newRig(t)
	here, there := g.path("disks/here"), g.path("shelf/there")
	if err := errors.Join(os.MkdirAll(g.path("disks"), 0o700), os.MkdirAll(g.path("shelf"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "a", Paths: []string{here, g.path("second")}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.close()
	if err := os.Rename(here, there); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.wantStates("a:closed")
	i, err := g.e.Pool("a")
	if err != nil || i.Open || !strings.Contains(i.Reason, here) || len(i.Devices) != 2 || i.Devices[0].Present {
		t.Errorf("the missing device is not named: %+v, %v", i, err)
	}
	g.close()
	g.config.Scan = []string{g.path("shelf"), g.path("nowhere")}
	g.open()
	g.wantStates("a:online")
	g.config.Scan = nil
	g.restart() // the new place is remembered
	g.wantStates("a:online")
	i, err = g.e.Pool("")
	if err != nil || i.Devices[0].Path != there {
		t.Errorf("%+v, %v", i.Devices, err)
	}
}

func TestAMissingDeviceKeepsOnlyItsPoolClosed(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.volume("a/v")
	second := g.path("b2")
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "b", Paths: []string{g.path("b1"), second}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.volume("b/w")
	g.close()
	if err := os.Rename(second, second+".away"); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.wantStates("a:online b:closed")
	// What a closed pool may hold is unknown, and never "not found".
	var closed *engine.NotOpenError
	var missing *pool.MissingError
	for _, ref := range []string{"w", "b/w", "x"} {
		_, err := g.e.Volume(ref)
		if !errors.As(err, &closed) || !errors.As(err, &missing) || errors.Is(err, pool.ErrNotFound) || len(missing.Missing) != 1 {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := g.e.Volume("v"); err != nil {
		t.Error(err)
	}
	_, err := g.e.Volume("a/x")
	wantError(t, "in an open pool", err, pool.ErrNotFound, "x")
	g.config.ReadOnly = true
	g.restart()
	g.wantStates("a:read-only b:read-only")
	if i, err := g.e.Pool("b"); err != nil || i.Devices[0].Present == i.Devices[1].Present {
		t.Errorf("%+v, %v", i.Devices, err)
	}
	g.config.ReadOnly = false
	if err := os.Rename(second+".away", second); err != nil {
		t.Fatal(err)
	}
	g.restart()
	g.wantStates("a:online b:online")
}

func TestACopyOfADeviceIsNotGuessedAt(t *testing.T) {
	g := newRig(t)
	first := g.path("a1")
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "a", Paths: []string{first}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.close()
	b, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(g.path("copies"), 0o700), os.WriteFile(g.path("copies/x"), b, 0o600), os.WriteFile(g.path("copies/y"), b, 0o600), os.Remove(first)); err != nil {
		t.Fatal(err)
	}
	g.config.Scan = []string{g.path("copies")}
	g.open()
	if i, err := g.e.Pool("a"); err != nil || i.Open || !strings.Contains(i.Reason, "copies") {
		t.Errorf("%+v, %v", i, err)
	}
	if err := os.Remove(g.path("copies/y")); err != nil {
		t.Fatal(err)
	}
	g.restart()
	g.wantStates("a:online")
}

func TestVolumesByName(t *testing.T) {
	g := newRig(t)
	_, err := g.e.CreateVolume("", pool.VolumeSpec{Name: "v", Size: mib})
	wantError(t, "without a pool", err, engine.ErrNoDefault)
	g.pool("a")
	g.volume("v") // in the only pool
	g.pool("b")
	_, err = g.e.CreateVolume("", pool.VolumeSpec{Name: "x", Size: mib})
	wantError(t, "two pools", err, engine.ErrNoDefault)
	_, err = g.e.CreateVolume("b", pool.VolumeSpec{Name: "v", Size: mib})
	wantError(t, "a name of another pool", err, pool.ErrExists, "pool a")
	_, err = g.e.CreateVolume("a", pool.VolumeSpec{Name: "b/x", Size: mib})
	wantError(t, "two pools named", err, pool.ErrInvalid)
	_, err = g.e.CreateVolume("c", pool.VolumeSpec{Name: "x", Size: mib})
	wantError(t, "no such pool", err, pool.ErrNotFound, "c")
	for _, name := range []string{"", "a@b", "-x", "x y", "b/", strings.Repeat("x", 129)} {
		_, err = g.e.CreateVolume("b", pool.VolumeSpec{Name: name, Size: mib})
		wantError(t, name, err, pool.ErrInvalid)
	}
	g.volume("b/w")
	for ref, want := range map[string]string{"v": "a", "a/v": "a", "w": "b", "b/w": "b"} {
		if v, err := g.e.Volume(ref); err != nil || v.Pool != want {
			t.Errorf("%s: %+v, %v", ref, v, err)
		}
	}
	for ref, want := range map[string]error{"b/v": pool.ErrNotFound, "none": pool.ErrNotFound, "c/v": pool.ErrNotFound, "": pool.ErrInvalid, "/v": pool.ErrInvalid} {
		_, err := g.e.Volume(ref)
		wantError(t, ref, err, want)
	}
	if list, err := g.e.Volumes(""); err != nil || len(list) != 2 || list[0].Name != "v" {
		t.Errorf("%+v, %v", list, err)
	}
	if list, err := g.e.Volumes("b"); err != nil || len(list) != 1 || list[0].Name != "w" {
		t.Errorf("%+v, %v", list, err)
	}

	// The life of a volume, by references of both kinds.
	if _, err := g.e.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	_, err = g.e.CreateSnapshot("v", "s@t", nil)
	wantError(t, "snapshot name", err, pool.ErrInvalid)
	_, err = g.e.Clone("a/v", "s", pool.VolumeSpec{Name: "b/c"})
	wantError(t, "clone into another pool", err, pool.ErrInvalid)
	_, err = g.e.Clone("a/v", "s", pool.VolumeSpec{Name: "w"})
	wantError(t, "clone to a name of another pool", err, pool.ErrExists)
	if c, err := g.e.Clone("v", "s", pool.VolumeSpec{Name: "a/c"}); err != nil || c.Parent != "v@s" || c.Pool != "a" {
		t.Errorf("%+v, %v", c, err)
	}
	for ref, want := range map[string]int{"": 1, "a/": 1, "b/": 0, "v": 1, "c": 0} {
		if list, err := g.e.Snapshots(ref); err != nil || len(list) != want || want == 1 && list[0].Pool != "a" {
			t.Errorf("snapshots of %q: %+v, %v", ref, list, err)
		}
	}
	if err := errors.Join(g.e.Resize("v", 2*mib), g.e.SetLabels("a/v", map[string]string{"k": "l"}), g.e.Revert("v", "s")); err != nil {
		t.Error(err)
	}
	if v, _ := g.e.Volume("v"); v.Size != 2*mib || v.Labels["k"] != "l" || v.Snapshots != 1 {
		t.Errorf("%+v", v)
	}
	if m, err := g.e.Map("v"); err != nil || m.Size != 2*mib {
		t.Errorf("%+v, %v", m, err)
	}
	if _, next, err := g.e.Changes("v", "", "", 0, 10); err != nil || next != 2*mib {
		t.Errorf("%d, %v", next, err)
	}
	_, err = g.e.DeleteVolume("v", false)
	wantError(t, "with snapshots", err, pool.ErrHasSnapshots)
	j, err := g.e.DeleteSnapshot("v", "s")
	if err != nil {
		t.Fatal(err)
	}
	if done, err := g.e.WaitJob(t.Context(), j.ID); err != nil || done.Target != "v@s" || done.ID != j.ID {
		t.Errorf("%+v, %v", done, err)
	}
	if _, err := g.e.DeleteVolume("v", false); err != nil {
		t.Error(err)
	}
}

func TestOneNameIsMadeOnceByManyAtATime(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.pool("b")
	var group sync.WaitGroup
	made := make(chan string, 16)
	for i := range cap(made) {
		group.Go(func() {
			name := []string{"a", "b"}[i%2]
			_, err := g.e.CreateVolume(name, pool.VolumeSpec{Name: "v", Size: mib})
			switch {
			case err == nil:
				made <- name
			case !errors.Is(err, pool.ErrExists) && !errors.Is(err, engine.ErrBusy):
				t.Error(err)
			}
		})
	}
	group.Wait()
	if len(made) > 1 {
		t.Errorf("made %d times", len(made))
	}
}

func TestAnImportedPoolMayHoldNamesThatAreTaken(t *testing.T) {
	g := newRig(t)
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "a", Paths: []string{g.path("a1")}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.volume("v")
	if err := g.e.ClosePool("a"); err != nil {
		t.Fatal(err)
	}
	g.pool("b")
	g.volume("v")
	if _, err := g.e.ImportPool(engine.ImportSpec{Paths: []string{g.path("a1")}}); err != nil {
		t.Fatal(err)
	}
	_, err := g.e.Volume("v")
	wantError(t, "v", err, engine.ErrAmbiguous, "a, b")
	for _, name := range []string{"a", "b"} {
		if v, err := g.e.Volume(name + "/v"); err != nil || v.Pool != name {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if !slices.ContainsFunc(g.e.Events(0), func(e engine.Event) bool { return e.Kind == engine.EventAmbiguous && e.Volume == "v" }) {
		t.Error("no event says so")
	}
}

func TestDevicesHandedOutKeepTheirPoolOpen(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.volume("v")
	if _, err := g.e.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	v, err := g.e.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	s, err := g.e.OpenSnapshot("a/v", "s")
	if err != nil {
		t.Fatal(err)
	}
	if !s.Info().ReadOnly || v.Info().ReadOnly || v.Info().Size != mib {
		t.Errorf("%+v, %+v", v.Info(), s.Info())
	}
	wantError(t, "close", g.e.ClosePool("a"), pool.ErrInUse, "2")
	if _, err := g.e.GrowPool("a", 16*mib); err != nil {
		t.Errorf("grow while volumes are open: %v", err)
	}
	g.wantStates("a:online")
	wantError(t, "destroy", g.e.DestroyPool("a", true), pool.ErrInUse)
	wantError(t, "close the engine", g.e.Close(), pool.ErrInUse)
	if _, err := g.e.Volume("v"); err != nil {
		t.Errorf("after a Close that was refused: %v", err)
	}
	if err := errors.Join(v.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	e := g.e
	g.close()
	_, err = e.Volume("v")
	wantError(t, "after Close", err, engine.ErrClosed)
}

func TestClosedPoolsStayClosedUntilTheyAreImported(t *testing.T) {
	g := newRig(t)
	i := g.pool("a") // in the directory where pools are taken up by themselves
	g.volume("v")
	if err := g.e.ClosePool("a"); err != nil {
		t.Fatal(err)
	}
	g.wantStates("")
	g.restart()
	g.wantStates("")
	_, err := g.e.ImportPool(engine.ImportSpec{Name: "b"})
	wantError(t, "import of nothing", err, pool.ErrNotFound, "b")
	if back, err := g.e.ImportPool(engine.ImportSpec{UUID: i.UUID, ReadOnly: true}); err != nil || back.State != pool.StateReadOnly {
		t.Errorf("%+v, %v", back, err)
	}
	g.restart()
	g.wantStates("a:read-only")
	if back, err := g.e.ImportPool(engine.ImportSpec{Name: "a"}); err != nil || back.State != pool.StateOnline {
		t.Errorf("%+v, %v", back, err)
	}
	if back, err := g.e.ImportPool(engine.ImportSpec{Name: "a"}); err != nil || back.State != pool.StateOnline {
		t.Errorf("once more: %+v, %v", back, err)
	}
	g.restart()
	g.wantStates("a:online")
}

func TestAPoolWithoutARecordIsTakenUp(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.close()
	if err := os.Remove(filepath.Join(g.dir, "pools.json")); err != nil {
		t.Fatal(err)
	}
	g.open() // as after a crash between the format and the catalog
	g.wantStates("a:online")
	g.restart()
	g.wantStates("a:online")
}

func TestDestroyPool(t *testing.T) {
	g := newRig(t)
	kept := g.path("kept")
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "a", Paths: []string{kept}, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	g.pool("b")
	g.volume("b/v")
	wantError(t, "no name", g.e.DestroyPool("", true), pool.ErrInvalid)
	wantError(t, "unknown", g.e.DestroyPool("c", true), pool.ErrNotFound)
	wantError(t, "with volumes", g.e.DestroyPool("b", false), engine.ErrVolumes)
	if err := errors.Join(g.e.DestroyPool("a", false), g.e.DestroyPool("b", true)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(g.dir, "pools", "b.img")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the engine's own file stays: %v", err)
	}
	if i, err := os.Stat(kept); err != nil || i.Size() != 8*mib {
		t.Errorf("a file of others is gone: %v", err)
	}
	g.restart()
	g.wantStates("")
	if found, _, err := g.e.Scan([]string{kept}); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
}

func TestADestroyThatWasCutIsFinished(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.close()
	path := filepath.Join(g.dir, "pools.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	c["pools"].([]any)[0].(map[string]any)["destroying"] = true
	if b, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.wantStates("")
	if files, _ := filepath.Glob(filepath.Join(g.dir, "pools", "*")); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

func TestScanNamesWhatItSees(t *testing.T) {
	g := newRig(t)
	paths := []string{g.path("disks/1"), g.path("disks/2")}
	if err := os.Mkdir(g.path("disks"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := g.e.CreatePool(engine.PoolSpec{Name: "a", Paths: paths, Size: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	scan := func(want string) {
		t.Helper()
		found, _, err := g.e.Scan([]string{g.path("disks")})
		if err != nil || len(found) != 1 {
			t.Fatalf("%+v, %v", found, err)
		}
		f := found[0]
		if got := fmt.Sprintf("%s known=%v open=%v devices=%d missing=%d", f.Name, f.Known, f.Open, len(f.Devices), len(f.Missing)); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	scan("a known=true open=true devices=2 missing=0")
	if err := g.e.ClosePool("a"); err != nil {
		t.Fatal(err)
	}
	scan("a known=false open=false devices=2 missing=0")
	if err := os.Remove(paths[0]); err != nil {
		t.Fatal(err)
	}
	scan("a known=false open=false devices=1 missing=1")
	_, err := g.e.ImportPool(engine.ImportSpec{Paths: []string{g.path("disks")}})
	var missing *pool.MissingError
	if !errors.As(err, &missing) {
		t.Errorf("import with a device missing: %v", err)
	}
	g.wantStates("") // it is not taken into the catalog
	if i, err := g.e.ImportPool(engine.ImportSpec{Paths: []string{g.path("disks")}, ReadOnly: true}); err != nil || i.State != pool.StateReadOnly {
		t.Errorf("%+v, %v", i, err)
	}
	_, _, err = g.e.Scan([]string{g.path("nowhere")})
	wantError(t, "no such path", err, os.ErrNotExist)
}

func TestGrowAndAddDevice(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.volume("v")
	i, err := g.e.GrowPool("a", 16*mib)
	if err != nil || i.Total != 16*mib || i.Devices[0].Size != 16*mib {
		t.Errorf("%+v, %v", i, err)
	}
	_, err = g.e.GrowPool("", 4*mib)
	wantError(t, "never smaller", err, pool.ErrInvalid, "4MiB are less than the 16MiB its files have")
	if i, err := g.e.GrowPool("", 16*mib); err != nil || i.Total != 16*mib {
		t.Errorf("as large as it is: %+v, %v", i, err)
	}
	second := g.path("second")
	if i, err = g.e.AddDevice("a", second, 8*mib, false); err != nil || len(i.Devices) != 2 || !i.Devices[1].Present || i.Devices[1].Path != second {
		t.Errorf("%+v, %v", i, err)
	}
	foreign := g.path("foreign")
	if err := os.WriteFile(foreign, slices.Repeat([]byte("data"), 2*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = g.e.AddDevice("a", foreign, 0, false)
	wantError(t, "foreign", err, pool.ErrForeign, foreign)
	if i, err = g.e.AddDevice("a", foreign, 0, true); err != nil || len(i.Devices) != 3 {
		t.Errorf("forced: %+v, %v", i, err)
	}
	g.restart()
	g.wantStates("a:online")
	if i, err := g.e.Pool("a"); err != nil || i.Total != 16*mib+8*mib+8*mib {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestADamagedCatalogIsNamed(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.close()
	path := filepath.Join(g.dir, "pools.json")
	for text, want := range map[string]string{
		"":                                "pools.json",
		"{":                               "pool import",
		`{"version":2}`:                   "version 2",
		`{"version":1,"pools":[{"x":1}]}`: "pool import",
		`{"version":1,"pools":[{"name":"a"},{"name":"a"}]}`: "twice",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if e, err := engine.Open(g.config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
			if e != nil {
				_ = e.Close() // the test has failed
			}
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestAPoolThatDoesNotOpenSaysWhy(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	g.pool("b")
	g.close()
	g.fake.FailOpen = func(name string) error {
		if name == "a" {
			return fmt.Errorf("pool a: journal: %w", pool.ErrCorrupt)
		}
		return nil
	}
	g.open()
	g.wantStates("a:closed b:online")
	_, err := g.e.Volumes("a")
	wantError(t, "a", err, pool.ErrCorrupt, "journal")
	wantError(t, "destroy", g.e.DestroyPool("a", false), pool.ErrCorrupt, "unknown")
	events := g.e.Events(0)
	if !slices.ContainsFunc(events, func(e engine.Event) bool {
		return e.Kind == engine.EventNotOpened && strings.Contains(e.Message, "journal")
	}) {
		t.Errorf("%+v", events)
	}
	g.fake.FailOpen = nil
	if _, err := g.e.ImportPool(engine.ImportSpec{Name: "a"}); err != nil {
		t.Error(err)
	}
}

func TestEventsAreKeptAndFollowed(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	events := g.e.Events(0)
	if len(events) != 1 || events[0].Kind != engine.EventOpened || events[0].Sequence != 1 || events[0].Time.IsZero() {
		t.Fatalf("%+v", events)
	}
	s, late := g.e.Subscribe(0), g.e.SubscribeNew()
	if e, lost, err := s.Next(t.Context()); err != nil || e.Sequence != 1 || lost != 0 {
		t.Errorf("%+v, %d, %v", e, lost, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := late.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	got := make(chan engine.Event)
	go func() { // ends with the event
		e, _, err := late.Next(context.Background())
		if err != nil {
			t.Error(err)
		}
		got <- e
	}()
	if err := g.e.ClosePool("a"); err != nil {
		t.Error(err)
	}
	if e := <-got; e.Kind != engine.EventClosed || e.Pool != "a" || e.Sequence != 2 {
		t.Errorf("%+v", e)
	}
	if counts := g.e.EventCounts(); counts[engine.EventOpened] != 1 || counts[engine.EventClosed] != 1 {
		t.Errorf("%v", counts)
	}
	// More than are kept: a slow reader is told how many it missed.
	for range 600 {
		if _, err := g.e.ImportPool(engine.ImportSpec{Name: "a"}); err != nil {
			t.Fatal(err)
		}
		if err := g.e.ClosePool("a"); err != nil {
			t.Fatal(err)
		}
	}
	e, lost, err := s.Next(t.Context())
	if err != nil || lost == 0 || e.Sequence != 2+lost {
		t.Errorf("%d after %d lost, %v", e.Sequence, lost, err)
	}
	g.close()
	for err == nil {
		_, _, err = s.Next(context.Background())
	}
	if !errors.Is(err, engine.ErrClosed) {
		t.Error(err)
	}
}

func TestJobsHaveNamesOfTheirOwn(t *testing.T) {
	g := newRig(t)
	g.pool("a")
	j, err := g.e.Scrub("", 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = g.e.Scrub("a", 0)
	wantError(t, "a second scrub", err, pool.ErrInUse)
	if again, err := g.e.Job(j.ID); err != nil || again.ID != j.ID || !again.Ended.IsZero() {
		t.Errorf("%+v, %v", again, err)
	}
	for _, id := range []string{"", "a", "a:1", "a:1:x", "a:9:1", "b:1:1", "a:1:99"} {
		if _, err := g.e.Job(id); !errors.Is(err, pool.ErrNotFound) {
			t.Errorf("%q: %v", id, err)
		}
	}
	waited := make(chan error)
	go func() { // ends with the job
		_, err := g.e.WaitJob(context.Background(), j.ID)
		waited <- err
	}()
	if stopped, err := g.e.StopScrub("a"); err != nil || stopped.ID != j.ID || stopped.Ended.IsZero() {
		t.Errorf("%+v, %v", stopped, err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if j, err = g.e.Scrub("a", 0); err != nil {
		t.Fatal(err)
	}
	began := make(chan struct{})
	go func() { // ends with the pool
		close(began)
		_, err := g.e.WaitJob(context.Background(), j.ID)
		waited <- err
	}()
	<-began
	if err := g.e.ClosePool("a"); err != nil { // does not wait for those who wait
		t.Error(err)
	}
	if err := <-waited; err == nil {
		t.Error("a job of a closed pool ended well")
	}
}

func TestReplaceFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, text := range []string{"one", "two"} {
		if err := engine.ReplaceFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		info, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(b) != text || info.Mode() != 0o640 {
			t.Errorf("%q, %v, %v", b, info.Mode(), err)
		}
	}
	if err := engine.ReplaceFile(filepath.Join(path, "below"), nil, 0o600); err == nil {
		t.Error("a file below a file")
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}
