package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func newJobCommand() *cobra.Command {
	return groupCommand("job", "Follow work that goes on in the daemon",
		`A job is work that goes on in the daemon after the command that began it: a scrub,
the merge of a deleted snapshot, the freeing of a deleted volume's space.`,
		newJobListCommand(), newJobWatchCommand())
}

func newJobListCommand() *cobra.Command {
	r := new(controlpb.ListJobsRequest)
	c, s := controlCommand(&cobra.Command{
		Use: "list [flags]", Aliases: []string{"ls"}, Short: "List the jobs under way and the last that ended", Args: noArguments,
		Example: "  ashlar job list --running",
	}, asking(func(s *session, client *control.Client, _ []string) error {
		l, err := client.Jobs.List(s.ctx, r)
		if err != nil {
			return err
		}
		return list(s, l.GetJobs(), "jobs", jobHead, jobRow)
	}))
	addPoolFlag(c, s, &r.Pool, "only those in this pool")
	c.Flags().BoolVar(&r.Running, "running", false, "only those under way")
	return c
}

var jobHead = []string{"JOB", "KIND", "POOL", "TARGET", "STATE", ">DONE", ">TOTAL", ">%", "STARTED", "RESULT"}

func jobRow(j *controlpb.Job) []string {
	total, result := "", j.GetError()
	if j.GetTotalBytes() > 0 {
		total = humane(j.GetTotalBytes())
	}
	switch {
	case result != "":
	case j.GetNote() != "":
		result = "waits: " + j.GetNote()
	case j.GetDamagedBlocks() > 0:
		result = fmt.Sprintf("%d damaged blocks", j.GetDamagedBlocks())
	}
	return []string{j.GetId(), word(j.GetKind()), j.GetPool(), j.GetTarget(), word(j.GetState()), humane(j.GetDoneBytes()), total,
		percent(j.GetDoneBytes(), j.GetTotalBytes()), when(j.GetStarted()), result}
}

func writeJobs(out io.Writer, all []*controlpb.Job) error {
	t := newTable(jobHead...)
	for _, j := range all {
		t.add(jobRow(j)...)
	}
	return t.write(out)
}

// jobEnd says how a job ended.
func jobEnd(j *controlpb.Job) string {
	text := fmt.Sprintf("%s %s, %s", word(j.GetKind()), word(j.GetState()), humane(j.GetDoneBytes()))
	if j.GetStarted() != nil && j.GetEnded() != nil {
		text += " in " + j.GetEnded().AsTime().Sub(j.GetStarted().AsTime()).Round(time.Millisecond).String()
	}
	if j.GetKind() == controlpb.JobKind_JOB_KIND_SCRUB {
		text += fmt.Sprintf(", %d damaged blocks", j.GetDamagedBlocks())
	}
	return text
}

// jobError is the error of a job that ended otherwise than it should.
func jobError(j *controlpb.Job) error {
	switch {
	case j.GetState() == controlpb.JobState_JOB_STATE_FAILED:
		return fmt.Errorf("job %s failed: %s", j.GetId(), j.GetError())
	case j.GetState() == controlpb.JobState_JOB_STATE_CANCELED:
		return fmt.Errorf("job %s was stopped before its end", j.GetId())
	case j.GetDamagedBlocks() > 0:
		return fmt.Errorf("the scrub of pool %s found %d damaged blocks; `ashlar events` names them", j.GetPool(), j.GetDamagedBlocks())
	}
	return nil
}

func newJobWatchCommand() *cobra.Command {
	c, _ := controlCommand(&cobra.Command{
		Use: "watch [flags] JOB", Short: "Follow a job to its end",
		Long: `Watch shows the progress of a job, with its rate and the time left, until it ends;
of one that waits for somebody to act, what it waits for.
A job that fails, or a scrub that finds damage, gives exit code 1. With --output
json each state is an object on a line.`,
		Example: "  ashlar job watch tank/7",
		Args:    exactly("JOB"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		p := newProgress(s.cmd.ErrOrStderr())
		var writeErr error
		j, err := client.WaitJob(s.ctx, args[0], func(j *controlpb.Job) {
			if s.json() {
				writeErr = errors.Join(writeErr, writeJSONLine(s.out(), j))
			} else {
				p.show(j, time.Now())
			}
		})
		p.end()
		switch {
		case errors.Is(err, control.ErrCanceled):
			return fmt.Errorf("interrupted; job %s goes on in the daemon", args[0])
		case err != nil:
			return err
		case s.json():
			return errors.Join(writeErr, jobError(j))
		}
		fmt.Fprintf(s.out(), "job %s: %s\n", j.GetId(), jobEnd(j))
		return jobError(j)
	}), completeJobs)
	return c
}
