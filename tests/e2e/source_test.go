package e2e

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/meshlab"
)

// source is what the daemons know the mesh from. The second pass of make test is with "consul".
var source = flag.String("source", "file", "where the daemons know the mesh from: file, or consul for those tests that run with Consul agents too")

// eitherSource are the tests that run with both sources, so that each promise that a control plane has a part in is seen to be kept with Consul:
// what is redirected and what is not, who may connect, what strangers meet, and what happens while a daemon is gone.
var eitherSource = []string{
	"TestEveryFamilyAndNodeIsCapturedWhenInTheMeshAndUntouchedWhenNot",
	"TestAServiceReachesItselfByVirtualIPAndByItsOwnAddress",
	"TestLoopbackUDPAndForeignDestinationsAreUntouched",
	"TestAVirtualIPOfNobodyIsRefused",
	"TestTCPBehavesAsWithoutAProxy",
	"TestNginxAndCurl",
	"TestRedis",
	"TestAnIntentionFlipCutsLiveConnectionsInBothDirections",
	"TestAFlipOfAnotherPairsIntentionLeavesAConnectionAlone",
	"TestNoVerdictOfAnOlderPolicyFollowsOneOfANewer",
	"TestAStrictPortOfANamespaceGivesStrangersNothing",
	"TestAStrictPortInTheHostsNamespaceGivesStrangersNothing",
	"TestADeliveryTargetThatIsNotTheWorkloadsIsRefused",
	"TestAUnixSocketOfTheWorkloadIsDeliveredTo",
	"TestACgroupMadeAnewAtTheSamePathIsCapturedAndNoPlaintextLeavesIt",
	"TestTwoServicesInOnePodHaveTheirOwnIdentities",
	"TestAWorkloadThatComesBackInANewNamespaceIsServedThere",
	"TestWithADeadDaemonNothingConnectsAndASquatterHearsNothing",
	"TestAHungDaemonIsGivenUpWithinTheHeartbeatsBound",
	"TestADaemonThatStopsLetsLiveConnectionsEndAndRefusesNewOnes",
	"TestWithOnFailureOpenADeadDaemonLetsInstanceAddressesPassAndNoVirtualIP",
	"TestARestartedDaemonKeepsVirtualIPsAndMeshPorts",
	"TestCallsFollowServiceResolvers",
	"TestADaemonHandsOverUnderLoadAndNoNewConnectionFails",
	"TestListenersServeInTheNextDaemonsCgroupWhenTheirOwnIsGone",
	"TestAContainerIsReachedAtItsPublishedPort",
	"TestContainersOnABridgeAndInTheNodesNamespace",
	"TestAContainerThatNamesAServiceItMayNotBeGetsNoCertificate",
}

// fileOnly are the others, by reason.
var fileOnly = map[string][]string{
	"is about the files of the mesh directory, or the configuration": {
		"TestABadMeshFileIsNamedWithItsLineAndTheLastGoodStateServes",
		"TestAnIntentionForAnUnknownServiceIsAProblemAndNotAnError",
		"TestAnUnreadableCAKeyIsAnErrorThatNamesIt",
		"TestABadConfigurationIsRefusedWithFileAndLine",
	},
	"is about processes, cgroups and network namespaces, which no source has a part in": {
		"TestACgroupThatIsNotEnrolledRunsNoProgramOfOurs",
		"TestANamespaceThatAnotherProxyRedirectsIsLeftToIt",
		"TestRulesOfAnotherProxyThatComeAfterTheEnrolmentAreNamedAndOpenNothing",
		"TestAStrictPortInTheHostsNamespaceStaysClosedWhileItsApplicationRestarts",
		"TestAStrictPortInAPrivateNamespaceStaysClosedWhileItsApplicationRestarts",
		"TestAStrictPortStaysClosedWhenTheRegisteredAddressLeavesTheInterface",
		"TestStrictPortsStayClosedWhenARestartedDaemonCannotOpenAllNamespaces",
		"TestAStrangerOnLoopbackDoesNotStopDeliveryToTheWorkloadsOwnAddress",
		"TestAnInnerWorkloadOnTheOutersPortGetsNoDeliveryMeantForTheOuter",
		"TestAStrictWorkloadsPortStaysClosedBesideAPermissiveOneOfItsService",
		"TestAProcessThatFlipsNetworkNamespacesDoesNotBreakItsWorkload",
		"TestAnApplicationThatEndsConnectionsAtOnceIsNotTakenForAnother",
		"TestAPermissivePortLetsPlaintextInAndCountsIt",
		"TestAModeInTheWorkloadsOwnBlockGoesBeforeTheNodes",
		"TestASocketBoundToADeviceIsRefusedWithAReason",
		"TestOfNestedWorkloadsTheNearestGivesTheIdentity",
		"TestACgroupWithTwoNamespacesIsServedInBoth",
		"TestTwoWorkloadsInTheNodesNamespaceAreNotTakenForEachOther",
		"TestAWorkloadServesSeveralServicesByPort",
		"TestAnAddressThatTwoNamespacesHaveIsGuardedInTheWorkloadsAlone",
		"TestAWorkloadUnenrolledJustBeforeTheDaemonStopsIsLetGo",
		"TestAnInnerWorkloadThatIsUnenrolledFailsNoConnection",
		"TestEqualAddressesAndPortsInTwoNamespacesDoNotMeet",
		"TestAnAncestorOfTheDaemonIsRefusedAsAWorkload",
		"TestACgroupThatGoesAndComesWhileItIsEnrolledDisturbsNobody",
		"TestAWorkloadEnrolledByHandIsCapturedUntilItIsUnenrolled",
	},
	"is about the commands, the limits or the state in the kernel, which no source has a part in": {
		"TestCanariesOfAHealthyNodeAreAllOK",
		"TestACanarySaysThatTheApplicationDoesNotListenOrSomebodyElseDoes",
		"TestACanaryOfEachMissingHookFailsAndSaysWhatToDo",
		"TestAnInterruptedCheckLeavesNoProcessBehind",
		"TestCanariesOfAHungDaemonFailInBoundedTime",
		"TestAWorkloadWithFiftyThousandConnectionsMeetsItsCapAndItsNeighbourDoesNotNotice",
		"TestFiftyThousandUnfinishedHandshakesDoNotLockOutANeighbour",
		"TestCleanupRemovesEverythingWithoutDaemonOrConfiguration",
		"TestCleanupRefusesWhileADaemonRuns",
		"TestCleanupOfOneNodeLeavesTheOtherAlone",
		"TestTheCommandsShowWhatTheDaemonKnows",
		"TestACommandEndsWithItsStatus",
		"TestTheTraceSaysWhoCalledWhomHowAndWhy",
		"TestAWorkloadWhoseRulesFindNoRoomIsNotEnrolledAndTheOthersGoOn",
		"TestWorkloadsAreUnprotectedWhileAnAddressToRedirectFindsNoRoom",
		"TestTenThousandConnectionsLeaveNothingBehind",
		"TestAGibibyteGoesBothWaysAtOnceOverEightConnections",
		"TestTheTraceShowsWhatItsFiltersLetThrough",
		"TestWhatSomebodyDetachesIsRepairedAndCounted",
		"TestWhatCannotBeRepairedIsAnUnprotectedWorkload",
		"TestADaemonOfAnotherMapABIOrProtocolIsRefusedByName",
		"TestADaemonThatHangsIsDeadToItsOwnPodAlone",
		"TestTheNextDaemonMayHaveMetricsWhereTheOneBeforeIsInTheWay",
		"TestAHandOverWaitsShortlyForAProviderThatHasAProblem",
		"TestADaemonWithoutOneOfItsCapabilitiesSaysWhichAndHalfProtectsNobody",
	},
	"has a daemon that does not serve yet, by a mesh directory that is not there": {
		"TestWhenTheNextDaemonDiesInMidHandOverTheOneBeforeGoesOn",
		"TestWhenTheDaemonBeforeDiesInMidHandOverTheNextGoesOn",
		"TestADaemonThatIsStoppedInMidHandOverEndsAlsoWhenTheNextOneDies",
	},
	"Consul's sidecars are delivered to at 127.0.0.1 alone, where the directory's are tried at each address": {
		"TestASquatterOnTheApplicationsPortGetsNoDelivery",
		"TestASquatterThatComesBetweenTheCheckAndTheDialGetsNoByte",
	},
	"the answers come from a snapshot, whatever made it; tests/consul asks for names with Consul": {
		"TestEveryResolverFindsTheNamesOfTheMesh",
		"TestMessagesAreThoseOfANameServer",
		"TestQueriesOutliveTheDaemon",
		"TestNamesOfTheMeshAreAnsweredWhileADaemonHandsOver",
		"TestQueriesOnTheirWayAreAnsweredByTheDaemonThatHandsOver",
		"TestASquatterOnTheDNSPortGetsNothing",
		"TestWithoutDNSNothingIsAttachedForIt",
		"TestWorkloadsInTheNodesNamespaceFindTheNames",
	},
	"signs with, or rotates, the directory's CA; tests/consul does that with Consul's": {
		"TestAClientWithABadCertificateNeverReachesTheApplication",
		"TestAServerWithABadCertificateGetsNoByteOfTheApplications",
		"TestTheCertificateOnTheWireIsTheWorkloadsOwn",
		"TestARootRotationWithOneNodePausedFailsNoConnection",
		"TestLeavesThatAreRenewedUnderTrafficFailNoConnection",
		"TestTheServersNodeEnforcesIntentionsByItself",
		"TestTheServersNodeEnforcesIntentionsByItselfForEachStreamOfATunnel",
	},
	"defines what is enrolled later, for which the harness would wait; who is a workload is no matter of the source": {
		"TestAWorkloadIsEnrolledByALabelWhileItRuns",
		"TestALabelNamesTheIdentityAndItsRemovalTakesItAway",
		"TestALabelThatTheOwnerOfADelegatedCgroupSetsFetchesNoCertificate",
		"TestExclusionsOfALabel",
		"TestALabelDeclinesNames",
		"TestACgroupIsTakenOutOfItsWorkloadByALabel",
		"TestProvidersInConflictAreShownAndDecidedByOrder",
		"TestOnePortOfTheNodeForTwoServicesIsShown",
		"TestAContainerOfContainerdIsAWorkload",
		"TestChurnOfLabelledWorkloadsLeavesNothingBehind",
		"TestContainersThatComeAndGoAsFastAsTheirEngineCanLeaveNothing",
		"TestWhoGetsTheAddressOfAnotherGetsNoIdentity",
		"TestWhatASilentProviderMayHaveEnrolledStaysGuarded",
		"TestAnObservedWorkloadIsOnlyWatched",
	},
	"two real programs are enough to see the source carry them": {
		"TestPostgreSQL",
		"TestSMTP",
		"TestIperf3InBothDirections",
	},
	"is about the path within a node; tests/consul goes direct with Consul": {
		"TestWithinANodeBothPathsShowTheSame",
		"TestWithinANodeADenyCutsLiveConnectionsAndRefusesNewOnes",
		"TestWithADeadOrHungDaemonNothingNewIsGrantedAndWhatIsLiveGoesOn",
		"TestWhatCannotGoDirectTakesTheProxyAndExplainSaysWhy",
		"TestALabelOfEitherEndTakesTheProxyWithinANode",
		"TestAnApplicationDeliveredToOnLoopbackGoesDirectIfItListensOnEveryAddress",
		"TestAnApplicationThatStopsAndStartsIsGrantedAgain",
		"TestWorkloadsOfTheNodesNamespaceGoDirectAndTheirOwnServiceToo",
		"TestTenThousandDirectConnectionsLeaveNothing",
		"TestFlipsOfAnIntentionAgainstDirectConnectionsNeverGoBack",
		"TestDirectConnectionsGoOnAndNoneFailsWhileADaemonHandsOver",
	},
	"is about what was open before the enrolment, which no source has a part in": {
		"TestWhatAWorkloadDialledBeforeItsEnrolmentIsResetIfConfigured",
		"TestWhatAWorkloadAcceptedBeforeItsEnrolmentIsResetIfConfigured",
		"TestWhatGoesDirectIsNoConnectionOlderThanTheEnrolment",
		"TestAnObservedWorkloadKeepsWhatItHasOpen",
		"TestOlderConnectionsGoOnForAsLongAsConfiguredWhicheverDaemonRuns",
		"TestARestartedDaemonLeavesConnectionsAlone",
	},
	"is about these lists": {"TestEveryTestSaysWithWhichSourcesItRuns"},
}

// requireSource skips a test that does not run with the source that was asked for.
func requireSource(t *testing.T) {
	t.Helper()
	switch *source {
	case "file":
	case "consul":
		name, _, _ := strings.Cut(t.Name(), "/")
		for why, tests := range fileOnly {
			if slices.Contains(tests, name) {
				t.Skip("with the file source only: " + why)
			}
		}
		consul.Require(t)
	default:
		t.Fatalf("-source is file or consul, not %q", *source)
	}
}

// useAgents makes Consul agents the control plane, from which nothing is allowed by default either.
func (m *mesh) useAgents() {
	m.t.Helper()
	var err error
	m.agents, err = consul.NewPlane(m.ctx(), m.Mesh)
	m.must(err)
	m.Plane = m.agents
	m.must(m.Intentions("*", meshlab.Deny("*")))
}

// awaitCatalog waits until a daemon knows all that is defined, and that the other node serves its part.
func (m *mesh) awaitCatalog(node int) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		missing := m.agents.Instances()
		for _, svc := range s.Services {
			if len(svc.Virtual) == 0 {
				continue
			}
			for _, inst := range svc.Instances {
				_, err := netip.ParseAddrPort(inst.Address)
				if err == nil && inst.Healthy {
					missing[svc.Name]--
				}
			}
		}
		maps.DeleteFunc(missing, func(_ string, n int) bool { return n <= 0 })
		if len(missing) > 0 {
			return fmt.Errorf("instances are missing: %v of %+v", missing, s.Services)
		}
		return nil
	})
	m.must(err)
}

// comparable is what of a daemon's footprint must return to the baseline. With Consul, questions come and go.
func (m *mesh) comparable(f *footprint) *footprint {
	if m.agents == nil {
		return f
	}
	return &footprint{entries: map[string]int{"pending": f.entries["pending"], "direct": f.entries["direct"]}}
}

// TestEveryTestSaysWithWhichSourcesItRuns keeps the two lists complete.
func TestEveryTestSaysWithWhichSourcesItRuns(t *testing.T) {
	listed := slices.Clone(eitherSource)
	for _, tests := range fileOnly {
		listed = append(listed, tests...)
	}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, file := range files {
		if !strings.HasSuffix(file.Name(), "_test.go") || file.Name() == "main_test.go" {
			continue
		}
		text, err := os.ReadFile(file.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?m)^func (Test\w+)`).FindAllStringSubmatch(string(text), -1) {
			all = append(all, found[1])
		}
	}
	for _, name := range all {
		if n := len(slices.DeleteFunc(slices.Clone(listed), func(l string) bool { return l != name })); n != 1 {
			t.Errorf("%s is listed %d times: say whether it runs with both sources, or with the file source only and why", name, n)
		}
	}
	for _, name := range listed {
		if !slices.Contains(all, name) {
			t.Errorf("there is no %s", name)
		}
	}
}
